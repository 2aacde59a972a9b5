"""What megatron-core is told about the model and the job."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.models.transformer_config import transformer_config
from mindspeed_lora.parallel.groups import ParallelGroups

SHAPE = ModelShape(
    family="llama",
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=80,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=10,
    vocab_size=31,
    max_position_embeddings=64,
    norm_epsilon=3e-6,
    hidden_dropout=0.1,
    attention_dropout=0.2,
)


def test_the_shape_arrives(groups: ParallelGroups) -> None:
    config = transformer_config(SHAPE, ParallelConfig(), groups, torch.float32)
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (4, 48, 80)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (8, 4, 10)
    assert (config.layernorm_epsilon, config.hidden_dropout, config.attention_dropout) == (3e-6, 0.1, 0.2)
    assert config.gated_linear_unit and config.activation_func is F.silu


@pytest.mark.parametrize("proj", [False, True])
@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("qkv", [False, True])
def test_biases_are_on_where_any_linear_has_one(
    groups: ParallelGroups, proj: bool, mlp: bool, qkv: bool
) -> None:
    shape = dataclasses.replace(SHAPE, add_proj_bias=proj, add_mlp_bias=mlp, add_qkv_bias=qkv)
    config = transformer_config(shape, ParallelConfig(), groups, torch.float32)
    assert config.add_bias_linear is (proj or mlp)
    assert config.add_qkv_bias is qkv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype(groups: ParallelGroups, dtype: torch.dtype) -> None:
    config = transformer_config(SHAPE, ParallelConfig(), groups, dtype)
    assert config.params_dtype is config.pipeline_dtype is dtype
    assert (config.bf16, config.fp16) == (dtype is torch.bfloat16, dtype is torch.float16)


def test_sequence_parallelism_at_tp_1_has_no_effect(groups: ParallelGroups) -> None:
    parallel = ParallelConfig(sequence_parallel=True)
    assert transformer_config(SHAPE, parallel, groups, torch.float32).sequence_parallel is False
    two = dataclasses.replace(groups, tp_size=2)
    assert transformer_config(SHAPE, parallel, two, torch.float32).sequence_parallel is True
    assert transformer_config(SHAPE, ParallelConfig(), two, torch.float32).sequence_parallel is False


def test_what_the_pipeline_on_gloo_and_the_loss_need(groups: ParallelGroups) -> None:
    """Batched exchange mixes up two stages, deallocated buffers are still read, and without per-token loss
    the gradients would be scaled by the data-parallel size."""
    config = transformer_config(SHAPE, ParallelConfig(), groups, torch.float32, variable_seq_lengths=True)
    assert config.batch_p2p_comm is False
    assert config.deallocate_pipeline_outputs is False
    assert config.calculate_per_token_loss is True
    assert config.variable_seq_lengths is True


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        (None, (None, None, None)),
        (TrainingConfig(), (None, None, None)),
        (TrainingConfig(recompute_granularity="selective"), ("selective", None, None)),
        (TrainingConfig(recompute_granularity="full"), ("full", "uniform", 1)),
        (
            TrainingConfig(recompute_granularity="full", recompute_method="block", recompute_num_layers=3),
            ("full", "block", 3),
        ),
    ],
)
def test_recomputation(
    groups: ParallelGroups,
    training: TrainingConfig | None,
    expected: tuple[str | None, str | None, int | None],
) -> None:
    config = transformer_config(SHAPE, ParallelConfig(), groups, torch.float32, training)
    found = config.recompute_granularity, config.recompute_method, config.recompute_num_layers
    assert found == expected
    if expected[0] == "selective":
        assert config.recompute_modules == ["core_attn"]
