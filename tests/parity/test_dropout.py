"""Dropout of the adapter's input: PEFT with our masks, in every kind of layout the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.differences import LOSS_BETWEEN_LAYOUTS, Differences, largest_ratio
from tests.support.layouts import Layout
from tests.support.parity import Case, Outcome, ParityBench
from tests.support.reference import Recipe

CASE = Case(recipe=Recipe(dropout=0.1))
LAYOUTS = [
    Layout(tp=2, sequence_parallel=True, recompute="uniform"),
    Layout(pp=2, dp=2, recompute="selective"),
    Layout(cp=4, attention="hybrid"),
    Layout(tp=2, dp=2, sequence_parallel=True, fusion="chunks"),
    Layout(tp=2, sequence_parallel=True, fusion="published-merged"),
]
"""``chunks`` interleaves halves: of two rows on two ranks, of the tokens of one row on four."""
OTHERS = [
    Layout(tp=2),
    Layout(tp=2, sequence_parallel=True, fusion="chunks"),
    Layout(tp=2, fusion="chunks", recompute="uniform"),
    Layout(recompute="block"),
    Layout(tp=4, sequence_parallel=True),
    Layout(tp=2, pp=2, sequence_parallel=True, recompute="uniform"),
    Layout(tp=2, dp=2, distributed_optimizer=True),
    Layout(cp=2, attention="ring", tp=2, sequence_parallel=True),
    Layout(cp=2, attention="ulysses", pp=2, recompute="uniform"),
]


@pytest.fixture(scope="module")
def one_process(bench: ParityBench) -> Outcome:
    """The same case on one process of ours."""
    return bench.train(CASE, Layout())


def test_one_process_is_peft_with_our_masks(
    bench: ParityBench, one_process: Outcome, within: Callable[[Differences], None]
) -> None:
    within(bench.compare(CASE, one_process))
    without = bench.train(Case(), Layout())
    assert largest_ratio(without.losses, one_process.losses) > 1e-3, "something is dropped"


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.slow) for layout in OTHERS)], ids=str
)
def test_masks_do_not_depend_on_the_layout(
    layout: Layout, bench: ParityBench, one_process: Outcome, within: Callable[[Differences], None]
) -> None:
    outcome = bench.train(CASE, layout)
    within(bench.compare(CASE, outcome))
    assert largest_ratio(outcome.losses, one_process.losses) <= LOSS_BETWEEN_LAYOUTS


def test_masks_do_not_depend_on_the_micro_batch(bench: ParityBench, one_process: Outcome) -> None:
    outcome = bench.train(CASE, Layout(), ["--micro-batch-size", "4"])
    assert largest_ratio(outcome.losses, one_process.losses) <= LOSS_BETWEEN_LAYOUTS


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tp=2, dp=2), Layout(tp=2, sequence_parallel=True, fusion="chunks")], ids=str
)
def test_masks_do_not_depend_on_packing(layout: Layout, bench: ParityBench, one_process: Outcome) -> None:
    outcome = bench.train(CASE, layout, ["--packing", "--seq-length", "88"])
    assert largest_ratio(outcome.losses, one_process.losses) <= LOSS_BETWEEN_LAYOUTS
