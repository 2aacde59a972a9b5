from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mindspeed_lora.config.context import check_context, check_fixed_length, variable_multiple
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.errors import Refused
from tests.unit.config.test_checks import SHAPE

MODEL = dataclasses.replace(SHAPE, num_attention_heads=12, num_query_groups=4)


def parallel(
    algo: str, size: int, degree: int | None = None, tp: int = 1, sp: bool = False
) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=sp,
        context_parallel_size=size,
        context_parallel_algo=f"{algo}_cp_algo",
        ulysses_degree_in_cp=degree,
    )


@pytest.mark.parametrize(
    ("layout", "degrees"),
    [
        (ParallelConfig(), (1, 1)),
        (ParallelConfig(context_parallel_size=3), (1, 3)),
        (parallel("ulysses", 4), (4, 1)),
        (parallel("ulysses", 12), (12, 1)),
        (parallel("ulysses", 6, tp=2), (6, 1)),
        (parallel("hybrid", 8, 4), (4, 2)),
        (parallel("hybrid", 4, 1), (1, 4)),
        (parallel("megatron", 2, 1), (1, 2)),
        (parallel("hybrid", 1, 1), (1, 1)),
    ],
)
def test_degrees(layout: ParallelConfig, degrees: tuple[int, int]) -> None:
    check_context(MODEL, layout)
    assert layout.context_degrees == degrees


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (parallel("hybrid", 4), {}, "hybrid_cp_algo needs --ulysses-degree-in-cp"),
        (parallel("hybrid", 4, 3), {}, "--ulysses-degree-in-cp 3 does not divide --context-parallel-size 4"),
        (parallel("hybrid", 1, 2), {}, "--ulysses-degree-in-cp 2 does not divide --context-parallel-size 1"),
        (parallel("ulysses", 5), {}, "over 5 ranks cuts 12 query and 4 key/value heads.*use 1, 2, 4, 12, or"),
        (parallel("ulysses", 3), {}, "over 3 ranks cuts 12 query and 4 key/value heads"),
        (parallel("hybrid", 8, 4, tp=4), {}, "cuts 3 query and 1 key/value heads .*size 4.*use 1, 3, or"),
        (parallel("megatron", 2), {"attention_dropout": 0.1}, "--attention-dropout 0.1 with --context"),
    ],
)
def test_what_cannot_be(layout: ParallelConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        check_context(dataclasses.replace(MODEL, **changes), layout)


@pytest.mark.parametrize(
    ("layout", "pad_to", "multiple"),
    [
        (ParallelConfig(), 8, 8),
        (parallel("megatron", 1, tp=2), 1, 1),
        (parallel("megatron", 1, tp=2, sp=True), 1, 4),
        (parallel("megatron", 2), 1, 4),
        (parallel("ulysses", 2, tp=2), 1, 8),
        (parallel("hybrid", 4, 2, tp=2, sp=True), 3, 48),
    ],
)
def test_rows_that_differ_in_length_are_padded(layout: ParallelConfig, pad_to: int, multiple: int) -> None:
    assert variable_multiple(layout, pad_to) == multiple


@pytest.mark.parametrize(
    ("layout", "length", "message"),
    [
        (
            parallel("megatron", 2),
            42,
            "--seq-length 42 .* by 4, for two equal chunks .*; the nearest one is 44",
        ),
        (parallel("megatron", 2), 41, "the nearest one is 40"),
        (parallel("ulysses", 2, tp=2, sp=True), 3, "by 8, for .* and --sequence-parallel .* one is 8$"),
        (parallel("megatron", 1, tp=4, sp=True), 6, "by 4, for --sequence-parallel over .*size 4; .* is 8$"),
    ],
)
def test_a_fixed_length_that_cannot_be_cut(layout: ParallelConfig, length: int, message: str) -> None:
    with pytest.raises(Refused, match=message):
        check_fixed_length(layout, length)


def test_a_fixed_length_that_can() -> None:
    check_fixed_length(parallel("megatron", 2, tp=2), 44)
    check_fixed_length(parallel("ulysses", 2, tp=2, sp=True), 48)
    check_fixed_length(ParallelConfig(), 41)
