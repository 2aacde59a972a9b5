"""Every layout trains as PEFT does: logits, losses, norms, gradients and the final adapter."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.differences import LOSS_BETWEEN_LAYOUTS, Differences, largest_ratio
from tests.support.layouts import Layout, all_layouts, covering, pairs
from tests.support.parity import Case, Outcome, ParityBench
from tests.support.reference import Recipe

CASE = Case(recipe=Recipe(steps=20))
SHORT = Case()
"""What is tested in every pair of settings; the slow tests go on to 20 steps in every layout."""
LAYOUTS = covering(all_layouts())
NAMED = [Layout(tp=2, pp=2), Layout(pp=4, vpp=2, stages="noops")]
"""A layout that people start with, and one with more than two interleaved stages."""
OTHERS = [layout for layout in all_layouts() if layout not in NAMED]


@pytest.fixture(scope="module")
def one_process(bench: ParityBench) -> Outcome:
    """The same case on one process of ours."""
    return bench.train(CASE, Layout())


@pytest.fixture(scope="module")
def short_run(bench: ParityBench) -> Outcome:
    """The short case on one process of ours."""
    return bench.train(SHORT, Layout())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_pair_is_exact(
    layout: Layout, bench: ParityBench, short_run: Outcome, within: Callable[[Differences], None]
) -> None:
    outcome = bench.train(SHORT, layout)
    within(bench.compare(SHORT, outcome))
    assert largest_ratio(outcome.losses, short_run.losses) <= LOSS_BETWEEN_LAYOUTS


@pytest.mark.parametrize(
    "layout", [*NAMED, *(pytest.param(layout, marks=pytest.mark.slow) for layout in OTHERS)], ids=str
)
def test_layout_is_exact(
    layout: Layout, bench: ParityBench, one_process: Outcome, within: Callable[[Differences], None]
) -> None:
    outcome = bench.train(CASE, layout)
    within(bench.compare(CASE, outcome))
    assert largest_ratio(outcome.losses, one_process.losses) <= LOSS_BETWEEN_LAYOUTS


def test_reordering_no_sum_changes_no_bit(bench: ParityBench, short_run: Outcome) -> None:
    """A pipeline, no-ops and recomputation compute the very same products and sums in the same order."""
    for layout in (Layout(pp=2, stages="noops"), Layout(recompute="uniform")):
        outcome = bench.train(SHORT, layout)
        assert outcome.losses == short_run.losses
        assert all(outcome.end[name].equal(tensor) for name, tensor in short_run.end.items())


def test_default_layouts_cover_every_pair() -> None:
    wanted = set().union(*map(pairs, all_layouts()))
    assert wanted == set().union(*map(pairs, LAYOUTS))
    assert len(LAYOUTS) < len(all_layouts()) / 10
