"""Column- and row-parallel LoRA over TP ranks, in every schedule, against the dense formula by autograd."""

from __future__ import annotations

import os
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, given, settings

from mindspeed_lora.adapters.schedules import Family, SchedulePlan
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups
from tests.support.pool import WorkerPool
from tests.unit.adapters.dense import PROBLEMS, Problem, Result, dense, joined, sharded

PLANS = {
    "unfused": SchedulePlan(Family.UNFUSED),
    "one, whole": SchedulePlan(Family.ONE_COLLECTIVE),
    "one, own rows first": SchedulePlan(Family.ONE_COLLECTIVE, chunks=1),
    "one, chunks": SchedulePlan(Family.ONE_COLLECTIVE, chunks=3),
    "one, merged": SchedulePlan(Family.ONE_COLLECTIVE, merge_from=0),
    "one, merged, chunks": SchedulePlan(Family.ONE_COLLECTIVE, merge_from=0, chunks=2),
    "overlapped": SchedulePlan(Family.OVERLAPPED),
    "overlapped, merged": SchedulePlan(Family.OVERLAPPED, merge_from=0),
}
EXACT = 1e-11
"""In float64, sums of up to a hundred terms."""


def on_rank(
    problem: Problem, kind: str, sp: bool, plans: Sequence[SchedulePlan], dropout: float, dtype: torch.dtype
) -> list[Result]:
    tp = int(os.environ["WORLD_SIZE"])
    groups = initialize_groups(ParallelConfig(tensor_model_parallel_size=tp), seed=1)[0]
    results = [sharded(problem, kind, groups, sp, dropout, plan, dtype) for plan in plans]
    destroy_groups()
    return results


def over_ranks(
    workers: WorkerPool,
    problem: Problem,
    kind: str,
    plans: Sequence[SchedulePlan],
    tp: int = 2,
    sp: bool = False,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> list[Result]:
    """What each plan gives, joined."""
    ranks = workers.run(tp, on_rank, problem, kind, sp, plans, dropout, dtype)
    return [joined(list(results), kind, sp) for results in zip(*ranks, strict=True)]


def same(found: Result, expected: Result) -> None:
    pairs = [(found.output, expected.output), (found.grad_x, expected.grad_x)]
    pairs += [
        *zip(found.grad_a, expected.grad_a, strict=True),
        *zip(found.grad_b, expected.grad_b, strict=True),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT)


def distance(found: Result, expected: Result) -> float:
    """The largest relative difference of output, input gradient and every factor's gradient, by norm."""
    pairs = [(found.output, expected.output), (found.grad_x, expected.grad_x)]
    pairs += [
        *zip(found.grad_a, expected.grad_a, strict=True),
        *zip(found.grad_b, expected.grad_b, strict=True),
    ]
    return max(float((ours.double() - theirs).norm() / theirs.norm()) for ours, theirs in pairs)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
def test_every_schedule(workers: WorkerPool, sp: bool, kind: str, name: str) -> None:
    problem = PROBLEMS[name]
    expected = dense(problem, blocks=2 if kind == "column" else 1)
    for found in over_ranks(workers, problem, kind, [*PLANS.values()], sp=sp):
        same(found, expected)


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
def test_dropout_is_that_of_one_process(workers: WorkerPool, sp: bool, kind: str) -> None:
    problem = PROBLEMS["shared"]
    (whole,) = over_ranks(workers, problem, kind, [PLANS["unfused"]], tp=1, dropout=0.4)
    for found in over_ranks(workers, problem, kind, [*PLANS.values()], sp=sp, dropout=0.4):
        same(found, whole)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any shape that four ranks can share; one to three parts on any rows."""
    out = 4 * draw(st.integers(1, 6))
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        start = 4 * draw(st.integers(0, out // 4 - 1))
        stop = 4 * draw(st.integers(start // 4 + 1, out // 4))
        parts.append((start, stop, draw(st.integers(1, 5)), draw(st.sampled_from([0.25, 1.0, 2.0]))))
    return Problem(
        parts=tuple(parts),
        in_features=4 * draw(st.integers(1, 6)),
        out_features=out,
        s=4 * draw(st.integers(1, 5)),
        b=draw(st.integers(1, 3)),
    )


@pytest.mark.parametrize("examples", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_any_shape(workers: WorkerPool, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
    @given(
        problem=problems(),
        kind=st.sampled_from(["column", "row"]),
        chunks=st.integers(1, 6),
        tp=st.sampled_from([2, 4]),
        sp=st.booleans(),
    )
    def check(problem: Problem, kind: str, chunks: int, tp: int, sp: bool) -> None:
        expected = dense(problem, blocks=tp if kind == "column" else 1)
        merges = (SchedulePlan(Family.ONE_COLLECTIVE, merge, chunks) for merge in (None, 0))
        for found in over_ranks(
            workers, problem, kind, [*PLANS.values(), *merges], tp, sp, dtype=torch.float32
        ):
            # float32 rounds to 6e-8; the sums here have at most a hundred terms of changing sign.
            assert distance(found, expected) <= 1e-5

    check()


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(workers: WorkerPool, dtype: torch.dtype, kind: str) -> None:
    problem = Problem(parts=((0, 32, 8, 2.0),), in_features=48, out_features=32, s=16)
    expected = dense(problem, blocks=2 if kind == "column" else 1)
    for found in over_ranks(workers, problem, kind, [*PLANS.values()], sp=True, dtype=dtype):
        # Each stored value rounds by half an eps; a path goes through at most eight of them, whose errors add up.
        assert distance(found, expected) <= 4 * torch.finfo(dtype).eps
