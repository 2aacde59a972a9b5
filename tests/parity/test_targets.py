"""Adapters on some of the linears only train as in PEFT."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.differences import Differences
from tests.support.layouts import Layout
from tests.support.parity import Case, ParityBench


@pytest.mark.parametrize(
    ("targets", "layout"),
    [
        (("linear_qkv",), Layout(tp=2, sequence_parallel=True)),
        (("linear_proj",), Layout(tp=2)),
        (("linear_fc1", "linear_proj"), Layout(pp=2, recompute="uniform")),
        # Nothing below the last linear of a layer is trained in the first layer.
        (("linear_fc2",), Layout(tp=2, pp=2, sequence_parallel=True, recompute="block")),
    ],
    ids=str,
)
def test_subset_of_targets(
    targets: tuple[str, ...], layout: Layout, bench: ParityBench, within: Callable[[Differences], None]
) -> None:
    case = Case(targets=targets)
    outcome = bench.train(case, layout)
    assert {name.split(".")[-2] for name in outcome.end} == set(targets)
    within(bench.compare(case, outcome))
