from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mindspeed_lora.adapters.spec import AdapterSpec
from mindspeed_lora.config.shape import MLAShape, ModelShape, MoEShape
from mindspeed_lora.training.reporting import ModelFlops
from mindspeed_lora.training.reporting.model_flops import tflops_per_gpu
from tests.support.adapters import new_adapter
from tests.unit.training.reporting.records import step_record

SHAPE = ModelShape(
    family="llama",
    num_layers=3,
    hidden_size=8,
    ffn_hidden_size=20,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=2,
    vocab_size=50,
    max_position_embeddings=64,
)
MATRICES = 3 * ((4 + 2 * 2) * 2 * 8 + 4 * 2 * 8 + 3 * 8 * 20) + 50 * 8


def spec(**flags: Any) -> AdapterSpec:
    return new_adapter(SHAPE, 5, **flags).spec


def test_all_parameters_trained_is_six_operations_a_weight() -> None:
    assert ModelFlops.of(SHAPE, None).per_token == 6 * MATRICES


def test_a_frozen_weight_costs_four_and_the_adapter_six() -> None:
    adapters = 3 * 5 * ((16 + 8) + (8 + 8) + (40 + 8) + (8 + 20))
    assert ModelFlops.of(SHAPE, spec()).per_token == 4 * MATRICES + 6 * adapters
    assert (
        ModelFlops.of(SHAPE, spec(lora_target_modules=("linear_fc2",))).per_token
        == 4 * MATRICES + 6 * 3 * 5 * 28
    )


def test_attention_grows_with_the_square_of_the_row() -> None:
    flops = ModelFlops.of(SHAPE, spec())
    one = flops.operations(tokens=100, samples=1) - 100 * flops.per_token
    two = flops.operations(tokens=200, samples=1) - 200 * flops.per_token
    assert two == pytest.approx(4 * one)
    # Forward: queries with keys and weights with values, [100, 8] by [8, 100], of which half is seen.
    assert one == pytest.approx(3 * (3 * 2 * (2 * 100 * 8 * 100) / 2))


def test_rate_is_of_one_device_over_the_interval() -> None:
    flops = ModelFlops(per_token=1e9, per_token_and_length=0.0)
    steps = [step_record(1, tokens=1000, elapsed_ms=100.0), step_record(2, tokens=3000, elapsed_ms=300.0)]
    assert tflops_per_gpu(flops, steps, samples=16, world_size=4) == pytest.approx(2.5)


def test_latent_attention_and_the_experts_that_a_token_takes() -> None:
    mla = MLAShape(q_lora_rank=6, kv_lora_rank=5, qk_head_dim=3, qk_pos_emb_head_dim=2, v_head_dim=4)
    moe = MoEShape(num_experts=8, topk=2, ffn_hidden_size=10, dense_layers=(0,), shared_ffn_hidden_size=7)
    shape = dataclasses.replace(
        SHAPE, family="deepseek_v3", num_query_groups=4, kv_channels=5, mla=mla, moe=moe
    )
    attention = 6 * 8 + 4 * 5 * 6 + (5 + 2) * 8 + 4 * (3 + 4) * 5 + 8 * 4 * 4
    experts = 8 * 8 + 2 * 3 * 8 * 10 + 3 * 8 * 7
    flops = ModelFlops.of(shape, None)
    assert flops.per_token == 6 * (3 * attention + 3 * 8 * 20 + 2 * experts + 50 * 8)
    # Half of a row is seen: queries with keys of width 5, weights with values of width 4, four heads, three layers.
    assert flops.per_token_and_length == 3 * 2 * 0.5 * 3 * 4 * (5 + 4)
