"""How long tokens travel by how long products take: what halving a row's tokens is decided on."""

from __future__ import annotations

import math

import pytest
import torch

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.shape import ModelShape, MoEShape
from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups
from mindspeed_lora.training.experts import exchange_share
from tests.support.pool import WorkerPool

SHAPE = ModelShape(
    family="mixtral",
    num_layers=4,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=11,
    max_position_embeddings=32,
    moe=MoEShape(num_experts=8, topk=2, ffn_hidden_size=12),
)


def shares(ep: int, tp: int, etp: int) -> tuple[float, float]:
    """Of cheap products and of dear ones."""
    groups, _ = initialize_groups(
        ParallelConfig(
            expert_model_parallel_size=ep, tensor_model_parallel_size=tp, expert_tensor_parallel_size=etp
        ),
        2,
    )
    try:
        cheap, dear = (exchange_share(SHAPE, 64, flops, groups, torch.float32) for flops in (1e3, 1e9))
    finally:
        destroy_groups()
    return cheap, dear


@pytest.mark.parametrize(("ep", "tp", "etp"), [(2, 1, 1), (1, 2, 2), (2, 2, 1)])
def test_every_rank_finds_the_same_and_products_count(
    workers: WorkerPool, ep: int, tp: int, etp: int
) -> None:
    found = workers.run(2, shares, ep, tp, etp)
    assert found[0] == found[1]
    cheap, dear = found[0]
    assert math.isfinite(cheap)
    assert cheap > 100 * dear > 0.0
