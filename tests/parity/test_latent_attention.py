"""Multi-latent attention trains as transformers and PEFT do: adapters on every linear of it, in every way to cut it.

DeepSeek-V3 with a latent of the queries, YaRN and an mscale; V2 as the Lite model has it, without either.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.differences import Differences
from tests.support.layouts import Layout, all_layouts, covering
from tests.support.parity import Case, ParityBench
from tests.support.reference import Recipe

COMMON = ("linear_kv_down_proj", "linear_kv_up_proj", "linear_proj")
"""Not those of the MLP: PEFT takes their names in a model of this type for the experts'."""
V3 = Case(model="deepseek-v3", targets=("linear_q_down_proj", "linear_q_up_proj", *COMMON))
V2 = Case(model="deepseek-v2", targets=("linear_q_proj", *COMMON))
LAYOUTS = [
    Layout(tp=2),
    Layout(tp=2, sequence_parallel=True),
    Layout(pp=2, recompute="selective"),
    Layout(cp=2, attention="ring"),
    Layout(cp=2, attention="ulysses"),
    Layout(tp=2, pp=2, sequence_parallel=True, recompute="block", fusion="chunks"),
]
OTHERS = [layout for layout in covering(all_layouts()) if layout not in LAYOUTS]


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.slow) for layout in OTHERS)], ids=str
)
def test_deepseek_v3(layout: Layout, bench: ParityBench, within: Callable[[Differences], None]) -> None:
    outcome = bench.train(V3, layout)
    assert V3.targets is not None
    assert {name.split(".")[-2] for name in outcome.end} == set(V3.targets)
    within(bench.compare(V3, outcome))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, cp=2, attention="ring", sequence_parallel=True),
        pytest.param(Layout(tp=2, sequence_parallel=True, fusion="published"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_deepseek_v2_without_a_latent_of_queries(
    layout: Layout, bench: ParityBench, within: Callable[[Differences], None]
) -> None:
    within(bench.compare(V2, bench.train(V2, layout)))


@pytest.mark.parametrize(
    ("targets", "layout"),
    [
        # The shared key reaches the down projection alone: its gradient is one rank's heads' without a sum.
        (("linear_kv_down_proj",), Layout(tp=2)),
        pytest.param(("linear_q_down_proj",), Layout(tp=2, sequence_parallel=True), marks=pytest.mark.slow),
        pytest.param(
            ("linear_kv_up_proj", "linear_q_up_proj"),
            Layout(tp=2, sequence_parallel=True),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_subset_of_targets(
    targets: tuple[str, ...], layout: Layout, bench: ParityBench, within: Callable[[Differences], None]
) -> None:
    case = Case(model="deepseek-v3", targets=targets)
    within(bench.compare(case, bench.train(case, layout)))


@pytest.mark.parametrize(
    "layout",
    [Layout(tp=2, sequence_parallel=True), pytest.param(Layout(tp=2), marks=pytest.mark.slow)],
    ids=str,
)
def test_all_parameters(layout: Layout, bench: ParityBench, within: Callable[[Differences], None]) -> None:
    """The down projections and the norms of the latents have no adapter here: their own gradients are compared."""
    case = Case(model="deepseek-v3", targets=None, recipe=Recipe(lr=5e-4, min_lr=5e-5))
    within(bench.compare(case, bench.train(case, layout)))


def test_dropout_is_that_of_one_process(bench: ParityBench, within: Callable[[Differences], None]) -> None:
    """Under SP a down projection sees its own part of the sequence, and drops what the whole would there."""
    case = Case(model="deepseek-v3", targets=V3.targets, recipe=Recipe(dropout=0.3))
    within(bench.compare(case, bench.train(case, Layout(tp=2, sequence_parallel=True))))


@pytest.mark.parametrize(
    ("model", "layout", "extra"),
    [
        ("deepseek-v3-moe", Layout(tp=2, sequence_parallel=True), "--expert-tensor-parallel-size 1"),
        ("deepseek-v2-moe", Layout(dp=2), ""),
    ],
    ids=["v3 tp2 sp ep2", "v2 dp2 ep2"],
)
def test_with_experts(
    model: str, layout: Layout, extra: str, bench: ParityBench, within: Callable[[Differences], None]
) -> None:
    """Experts taken by groups, with a bias on the choice (V3) or without, and shared experts."""
    assert V3.targets is not None
    # Experts of random weights make what Adam leaves of rounding grow in the logits: smaller steps.
    recipe = Recipe(lr=2e-4, min_lr=2e-5)
    case = Case(model=model, targets=(*V3.targets, "linear_fc1", "linear_fc2"), recipe=recipe)
    flags = ["--expert-model-parallel-size", "2", "--moe-grouped-gemm", *extra.split()]
    within(bench.compare(case, bench.train(case, layout, flags)))
