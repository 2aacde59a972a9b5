"""Every model family trains as PEFT does, sharded: tied embeddings, biases, head norms, windows, scaled RoPE."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.differences import Differences
from tests.support.layouts import Layout, all_layouts, covering
from tests.support.models import MODELS
from tests.support.parity import Case, ParityBench

FAMILIES = [name for name in MODELS if name != "llama"]
"""Plain Llama has every layout of ``test_layouts.py``."""
DEFAULT = [
    Layout(tp=2, pp=2, sequence_parallel=True, recompute="block"),
    Layout(tp=2, dp=2, distributed_optimizer=True, recompute="selective"),
]
OTHERS = [layout for layout in covering(all_layouts()) if layout not in DEFAULT]


@pytest.mark.parametrize("attention", ["ring", "ulysses"])
def test_windows_over_cut_rows(
    attention: str, bench: ParityBench, within: Callable[[Differences], None]
) -> None:
    case = Case(model="mistral-window")
    within(bench.compare(case, bench.train(case, Layout(cp=2, attention=attention))))


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize(
    "layout", [*DEFAULT, *(pytest.param(layout, marks=pytest.mark.slow) for layout in OTHERS)], ids=str
)
def test_family_is_exact(
    model: str, layout: Layout, bench: ParityBench, within: Callable[[Differences], None]
) -> None:
    case = Case(model=model)
    within(bench.compare(case, bench.train(case, layout)))
