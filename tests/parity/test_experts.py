"""Adapters on every expert train as in PEFT, however experts, their matrices and the tokens are cut over ranks.

Each rank has other rows: gradients that were averaged over ranks which hold different experts would show here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.differences import Differences
from tests.support.expert_layouts import OVERLAP, ExpertLayout
from tests.support.layouts import Layout
from tests.support.models import EXPERTS
from tests.support.parity import Case, Outcome, ParityBench
from tests.support.reference import Recipe

LAYOUTS = [
    ExpertLayout(Layout()),
    ExpertLayout(Layout(dp=2), ep=2),
    ExpertLayout(Layout(dp=2), ep=2, more=OVERLAP + " --micro-batch-size 2"),
    ExpertLayout(Layout(dp=2, distributed_optimizer=True), etp=2),
    ExpertLayout(Layout(tp=2, sequence_parallel=True), ep=2, etp=1, more=OVERLAP + " --lora-fusion"),
    ExpertLayout(Layout(tp=2), etp=1),
    ExpertLayout(Layout(tp=2, dp=2, sequence_parallel=True), ep=2, etp=2),
    ExpertLayout(Layout(pp=2, vpp=2, dp=2, recompute="block"), ep=2, more=OVERLAP),
    ExpertLayout(Layout(cp=2, attention="ring"), ep=2),
    ExpertLayout(Layout(dp=2), ep=2, dispatcher="allgather"),
]
MORE = [
    ExpertLayout(Layout(dp=4, distributed_optimizer=True), ep=2, more=OVERLAP),
    ExpertLayout(Layout(pp=2, dp=2), ep=2, more=OVERLAP + " --micro-batch-size 2"),
    ExpertLayout(Layout(dp=4), ep=4),
    ExpertLayout(Layout(tp=2)),
    ExpertLayout(Layout(tp=2, sequence_parallel=True, recompute="uniform")),
    ExpertLayout(Layout(tp=2, dp=2, sequence_parallel=True), ep=2, more="--moe-tp-extend-ep"),
    ExpertLayout(Layout(pp=2, dp=2), ep=2),
    ExpertLayout(Layout(tp=2, pp=2, sequence_parallel=True, fusion="chunks"), ep=2, etp=1),
    ExpertLayout(Layout(tp=2, sequence_parallel=True), etp=2, dispatcher="allgather"),
]
TWO_RANKS = ExpertLayout(Layout(tp=2, sequence_parallel=True), ep=2, etp=1)
FOUR_RANKS = ExpertLayout(Layout(tp=2, dp=2, sequence_parallel=True), ep=2, etp=2)
FEW = [TWO_RANKS, pytest.param(FOUR_RANKS, marks=pytest.mark.slow)]


@pytest.mark.parametrize("cut", LAYOUTS, ids=str)
def test_cuts_are_exact(cut: ExpertLayout, bench: ParityBench, within: Callable[[Differences], None]) -> None:
    case = Case(model="mixtral")
    within(bench.compare(case, bench.train(case, cut.layout, cut.flags)))


@pytest.mark.slow
@pytest.mark.parametrize("cut", [*LAYOUTS, *MORE], ids=str)
def test_every_cut_is_exact(
    cut: ExpertLayout, bench: ParityBench, within: Callable[[Differences], None]
) -> None:
    case = Case(model="mixtral", recipe=Recipe(steps=20))
    within(bench.compare(case, bench.train(case, cut.layout, cut.flags)))


@pytest.mark.parametrize("model", [name for name in EXPERTS if name != "mixtral"])
@pytest.mark.parametrize("cut", FEW, ids=str)
def test_every_family_is_exact(
    model: str, cut: ExpertLayout, bench: ParityBench, within: Callable[[Differences], None]
) -> None:
    case = Case(model=model)
    within(bench.compare(case, bench.train(case, cut.layout, cut.flags)))


@pytest.mark.parametrize(
    "cut",
    [
        ExpertLayout(Layout(dp=2, distributed_optimizer=True), ep=2),
        ExpertLayout(Layout(tp=2, dp=2, sequence_parallel=True), ep=2, etp=2),
    ],
    ids=str,
)
def test_all_parameters(cut: ExpertLayout, bench: ParityBench, within: Callable[[Differences], None]) -> None:
    """Routers and experts are trained too; what was saved goes on in another layout."""
    case = Case(model="mixtral", targets=None, recipe=Recipe(lr=2e-4, min_lr=1e-5))
    within(bench.compare(case, bench.train(case, cut.layout, cut.flags)))


@pytest.mark.parametrize(
    "cut",
    [ExpertLayout(Layout(tp=2)), ExpertLayout(Layout(tp=2, sequence_parallel=True), ep=2, etp=1)],
    ids=str,
)
def test_adapters_on_routers(
    cut: ExpertLayout, bench: ParityBench, within: Callable[[Differences], None]
) -> None:
    peft = {"target_modules": ["o_proj"], "target_parameters": ["gate.weight", "experts.down_proj"]}
    case = Case(model="mixtral", peft=json.dumps(peft))
    within(bench.compare(case, bench.train(case, cut.layout, cut.flags)))


def test_shared_factors_go_on_without_the_flag(bench: ParityBench, tmp_path: Path) -> None:
    """The files tell that experts share factors: optimizer states fit, in another layout too, and nothing diverges."""
    lora = ["--lora-r", "4", "--lora-alpha", "8", "--lora-target-modules", "linear_qkv", "linear_fc1"]
    flags = [*bench.flags(Case(model="mixtral", recipe=Recipe(steps=6))), "--micro-batch-size", "1"]
    whole = bench.run([*flags, *lora, "--lora-moe-shared"], Layout())
    save = ["--save", str(tmp_path / "run"), "--lr-decay-iters", "6"]
    first = [*flags, *save, *lora, "--lora-moe-shared", "--train-iters", "3"]
    before = bench.run(first, Layout())
    cut = ExpertLayout(Layout(dp=2), ep=2)
    after = bench.run([*flags, *save, *lora, "--resume", "auto", *cut.flags], cut.layout)
    assert [*before.losses, *after.losses] == pytest.approx(whole.losses, rel=1e-5)
    assert after.end.keys() == whole.end.keys()
    assert not any("local_experts" in name for name in after.end)
    assert any("--lora-moe-shared" in notice for notice in after.ranks[0].notices)


@pytest.mark.parametrize(
    "flags",
    [
        "--lora-moe-shared",
        "--lora-dropout 0.1",
        "--moe-aux-loss-coeff 0.05 --moe-z-loss-coeff 0.01 --moe-alltoall-overlap-comm",
        pytest.param("--lora-modules-to-save router", marks=pytest.mark.slow),
    ],
)
def test_what_peft_does_not_have_is_the_same_in_every_cut(flags: str, bench: ParityBench) -> None:
    """Losses and gradients of all cuts against one process, within the rounding of fp32 sums in other orders."""
    case = Case(model="qwen2-moe")
    lora = "--lora-r 4 --lora-alpha 8 --lora-target-modules linear_qkv linear_fc1 linear_fc2 --micro-batch-size 1"

    def run(cut: ExpertLayout) -> Outcome:
        argv = [*bench.flags(case), *lora.split(), *flags.split(), *cut.layout.flags, *cut.flags]
        return bench.run(argv, cut.layout)

    alone = run(ExpertLayout(Layout()))
    assert alone.losses[-1] < alone.losses[0]
    for cut in (
        ExpertLayout(Layout(dp=2), ep=2),
        ExpertLayout(Layout(tp=2, dp=2, sequence_parallel=True), ep=2, etp=2),
        ExpertLayout(Layout(tp=2), etp=1),
    ):
        outcome = run(cut)
        for name in ("losses", "grad_norms"):
            found, expected = getattr(outcome, name), getattr(alone, name)
            assert found == pytest.approx(expected, rel=1e-5), f"{cut}: {name}"
        assert set(outcome.end) == set(alone.end)
