"""Every model family trains as PEFT does, sharded: tied embeddings, biases, head norms, windows, scaled RoPE."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.differences import Differences
from tests.support.layouts import Layout, all_layouts, covering
from tests.support.models import EXPERTS, MODELS
from tests.support.parity import Case, ParityBench
from tests.support.reference import Recipe

FAMILIES = [name for name in MODELS if name not in ("llama", *EXPERTS) and not name.startswith("deepseek")]
"""Plain Llama has every layout of ``test_layouts.py``, experts those of ``test_experts.py``, DeepSeek the linears of
``test_latent_attention.py``."""
SUBSUMED = ("gemma", "glm", "phi3")
"""What they compute beyond Llama, gemma2, glm4 and phi3-longrope do too."""
DEFAULT = Layout(tp=2, pp=2, sequence_parallel=True, recompute="block")
OTHERS = [
    Layout(tp=2, dp=2, distributed_optimizer=True, recompute="selective"),
    *(layout for layout in covering(all_layouts()) if layout != DEFAULT),
]


@pytest.mark.parametrize("attention", ["ring", "ulysses"])
def test_windows_over_cut_rows(
    attention: str, bench: ParityBench, within: Callable[[Differences], None]
) -> None:
    case = Case(model="mistral-window")
    within(bench.compare(case, bench.train(case, Layout(cp=2, attention=attention))))


@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=pytest.mark.slow) if name in SUBSUMED else name for name in FAMILIES]
)
@pytest.mark.parametrize(
    ("layout", "steps"),
    [
        (DEFAULT, 5),
        *(pytest.param(layout, 20, marks=pytest.mark.slow) for layout in [DEFAULT, *OTHERS]),
    ],
    ids=str,
)
def test_family_is_exact(
    model: str, layout: Layout, steps: int, bench: ParityBench, within: Callable[[Differences], None]
) -> None:
    case = Case(model=model, recipe=Recipe(steps=steps))
    within(bench.compare(case, bench.train(case, layout)))
