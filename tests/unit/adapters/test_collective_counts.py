"""How often, and how many bytes, a linear with an adapter sends, forward and backward together, in each schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch.distributed as dist

from mindspeed_lora.adapters.schedules import Family, SchedulePlan
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.parallel.groups import ParallelGroups, destroy_groups, initialize_groups
from tests.support.pool import WorkerPool
from tests.unit.adapters.dense import Problem, keys, linear, quantise_base

PROBLEM = Problem(parts=((0, 24, 3, 2.0),), in_features=16, out_features=24, s=8, b=2)
TOKENS, RANK, IN, OUT, TP = 16, 3, 16, 24, 2
LOCAL = TOKENS // TP
GATHER, SCATTER, REDUCE = "all-gather", "reduce-scatter", "all-reduce"
_FUNCTIONS = {"all_gather_into_tensor": GATHER, "all_to_all_single": SCATTER, "all_reduce": REDUCE}
"""Over gloo a reduce-scatter is an exchange."""

Sent = dict[tuple[str, int], int]
"""(Collective, width of its rows) → rows that a rank puts into it."""


Told = tuple[Sent, dict[str, int]]
"""What travels, rows summed over calls, and the number of calls."""


def sent(kind: str, sp: bool, jobs: Sequence[tuple[SchedulePlan, bool]]) -> list[Told]:
    """Of every job: a plan, and whether the weight is quantised."""
    groups = initialize_groups(ParallelConfig(tensor_model_parallel_size=TP), seed=1)[0]
    try:
        return [_sent(kind, sp, groups, plan, quantised) for plan, quantised in jobs]
    finally:
        destroy_groups()


def _sent(kind: str, sp: bool, groups: ParallelGroups, plan: SchedulePlan, quantised: bool) -> Told:
    layer, x = linear(PROBLEM, kind, groups, sp, plan=plan)
    if quantised:
        quantise_base(layer)
    rows: Counter[tuple[str, int]] = Counter()
    calls: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in _FUNCTIONS}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[0] if name == "all_reduce" else args[1]
            rows[_FUNCTIONS[name], tensor.size(-1)] += tensor[..., 0].numel()
            calls[_FUNCTIONS[name]] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in _FUNCTIONS:
        setattr(dist, name, counted(name))
    try:
        output, _ = layer(x.requires_grad_(), keys(PROBLEM))
        output.sum().backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return dict(rows), dict(calls)


def plan(family: Family, merge: bool = False, chunks: int = 0) -> SchedulePlan:
    return SchedulePlan(family, 0 if merge else None, chunks)


ONE, OVERLAPPED, UNFUSED = Family.ONE_COLLECTIVE, Family.OVERLAPPED, Family.UNFUSED
EXPECTED: dict[tuple[str, bool], dict[tuple[Family, bool], Sent]] = {
    ("column", True): {
        (ONE, False): {(GATHER, IN): 1, (SCATTER, IN): 1, (SCATTER, RANK): 1},
        (ONE, True): {(GATHER, IN): 1, (SCATTER, IN): 1, (SCATTER, RANK): 1},
        (OVERLAPPED, True): {(GATHER, IN): 1, (GATHER, RANK): 1, (SCATTER, RANK): 1, (SCATTER, IN): 1},
        (OVERLAPPED, False): {(GATHER, IN): 1, (GATHER, RANK): 2, (SCATTER, RANK): 1, (SCATTER, IN): 1},
        (UNFUSED, False): {(GATHER, IN): 1, (GATHER, RANK): 2, (SCATTER, RANK): 1, (SCATTER, IN): 1},
    },
    ("column", False): {
        (ONE, False): {(REDUCE, IN): 1},
        (ONE, True): {(REDUCE, IN): 1},
        (OVERLAPPED, False): {(REDUCE, IN): 1, (REDUCE, RANK): 1},
        (UNFUSED, False): {(REDUCE, IN): 1, (REDUCE, RANK): 1},
    },
    ("row", True): {
        (ONE, False): {(SCATTER, OUT): 1, (GATHER, OUT): 1},
        (ONE, True): {(SCATTER, OUT): 1, (GATHER, OUT): 1},
        (OVERLAPPED, True): {(SCATTER, RANK): 1, (SCATTER, OUT): 1, (GATHER, OUT): 1},
        (OVERLAPPED, False): {(SCATTER, RANK): 1, (SCATTER, OUT): 1, (GATHER, OUT): 1},
        (UNFUSED, False): {(SCATTER, RANK): 1, (SCATTER, OUT): 1, (GATHER, OUT): 1, (GATHER, RANK): 1},
    },
    ("row", False): {
        (ONE, False): {(REDUCE, OUT): 1},
        (ONE, True): {(REDUCE, OUT): 1},
        (OVERLAPPED, False): {(REDUCE, OUT): 1, (REDUCE, RANK): 1},
        (UNFUSED, False): {(REDUCE, OUT): 1, (REDUCE, RANK): 1},
    },
}
"""Logical collectives; those of the base alone have the width of the whole input (column) or output (row)."""


@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_what_travels(workers: WorkerPool, kind: str, sp: bool) -> None:
    expected = EXPECTED[kind, sp]
    for told in workers.run(TP, sent, kind, sp, [(plan(*schedule), False) for schedule in expected]):
        for (found, calls), (schedule, logical) in zip(told, expected.items(), strict=True):
            # A gather and a reduce-scatter send this rank's rows, or the other one's; an all-reduce takes all.
            rows = {what: count * (TOKENS if what[0] == REDUCE else LOCAL) for what, count in logical.items()}
            assert found == rows, schedule
            assert sum(calls.values()) == sum(logical.values()), schedule


@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_over_a_quantised_weight_the_same_travels(workers: WorkerPool, kind: str, sp: bool) -> None:
    """Merging is asked for and not done: then the split form of a schedule is what runs."""
    schedules = list(EXPECTED[kind, sp])
    of_split = [(plan(family), False) for family, _ in schedules]
    quantised = [(plan(*schedule), True) for schedule in schedules]
    for told in workers.run(TP, sent, kind, sp, [*of_split, *quantised]):
        assert told[len(schedules) :] == told[: len(schedules)]


@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_chunks_send_the_same(workers: WorkerPool, kind: str, sp: bool) -> None:
    logical = EXPECTED[kind, sp][ONE, False]
    for (whole, _), (found, calls) in workers.run(
        TP, sent, kind, sp, [(plan(ONE), False), (plan(ONE, chunks=4), False)]
    ):
        assert found == whole
        base = sum(count for (_, width), count in logical.items() if width != RANK)
        assert sum(calls.values()) == 4 * base + (sum(logical.values()) - base)
