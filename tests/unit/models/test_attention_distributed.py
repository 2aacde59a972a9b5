"""Dropout of attention weights over TP ranks, each of which has other heads."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.models.attention import CoreAttention
from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups
from tests.support.pool import WorkerPool


def drop(dropout: float) -> tuple[torch.Tensor, float]:
    """What one head makes of the same input on this rank, and the next number of the default stream."""
    groups, _ = initialize_groups(ParallelConfig(tensor_model_parallel_size=2), seed=1)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        attention_dropout=dropout,
        tensor_model_parallel_size=2,
    )
    module = CoreAttention(config, layer_number=1, attn_mask_type=None, attention_type="self").train()
    x = torch.linspace(-1, 1, 9 * 8).view(9, 1, 1, 8)
    out = module(x, x, x)
    following = torch.rand(1).item()
    destroy_groups()
    return out, following


@pytest.mark.parametrize(("dropout", "alike"), [(0.5, False), (0.0, True)])
def test_each_tp_rank_drops_other_elements(workers: WorkerPool, dropout: float, alike: bool) -> None:
    (first, first_next), (second, second_next) = workers.run(2, drop, dropout)
    assert torch.equal(first, second) is alike
    assert first_next == second_next, "what is replicated goes on in step"
