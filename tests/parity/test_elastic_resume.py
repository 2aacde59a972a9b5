"""A run that is saved in one layout and goes on in another is the run that nobody stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.differences import FACTOR, LOSS, largest_ratio
from tests.support.layouts import Layout
from tests.support.parity import Case, Outcome, ParityBench
from tests.support.reference import Recipe
from tests.support.shards import largest_relative_difference

SAVED_AT, STEPS = 3, 6
RECIPE = Recipe(steps=STEPS)
ADAPTER = Case(recipe=RECIPE)
DROPOUT = ["--lora-dropout", "0.1"]

SP_VPP = Layout(tp=2, pp=2, vpp=2, sequence_parallel=True)
ZERO1 = Layout(dp=2, distributed_optimizer=True, overlap="gather")
MOVES = [
    (SP_VPP, Layout(dp=2)),
    (Layout(dp=2), SP_VPP),
    (ZERO1, Layout(tp=2, sequence_parallel=True, recompute="uniform")),
]
SLOW_MOVES = [
    (Layout(pp=2, stages="uneven"), Layout(dp=2, pp=2, vpp=2, distributed_optimizer=True)),
    (Layout(cp=2, attention="ring", distributed_optimizer=True), Layout(pp=2, stages="noops")),
    (Layout(dp=4, distributed_optimizer=True), Layout(tp=4)),
    (Layout(tp=4), Layout(pp=4, vpp=2, stages="noops")),
    (Layout(pp=4), Layout(cp=2, dp=2, attention="ulysses", distributed_optimizer=True)),
    (Layout(cp=4, attention="hybrid"), Layout()),
    (Layout(), Layout(tp=2, dp=2, distributed_optimizer=True, overlap="gather")),
]


@pytest.fixture(scope="module")
def whole_runs() -> dict[Case, Outcome]:
    """The cases that one process trained through."""
    return {}


def stopped_and_taken_up(
    bench: ParityBench, case: Case, first: Layout, second: Layout, save: Path, extra: list[str]
) -> tuple[Outcome, Outcome]:
    """Some steps in the first layout, the others in the second one."""
    schedule = [*extra, "--lr-decay-iters", str(case.recipe.steps), "--save", str(save)]
    before = bench.train(case, first, [*schedule, "--train-iters", str(SAVED_AT)])
    after = bench.train(case, second, [*schedule, "--resume", "auto"])
    return before, after


def check(
    bench: ParityBench,
    case: Case,
    first: Layout,
    second: Layout,
    save: Path,
    extra: list[str],
    whole_runs: dict[Case, Outcome],
) -> Outcome:
    """The losses and the end are those of one process that trained through."""
    if case not in whole_runs:
        whole_runs[case] = bench.train(case, Layout(), [*extra, "--lr-decay-iters", str(STEPS)])
    whole = whole_runs[case]
    before, after = stopped_and_taken_up(bench, case, first, second, save, extra)
    assert (len(before.losses), len(after.losses)) == (SAVED_AT, STEPS - SAVED_AT)
    assert largest_ratio([*before.losses, *after.losses], whole.losses) <= LOSS
    # A layout may pad the vocabulary.
    end = {name: tensor[: len(whole.end[name])] for name, tensor in after.end.items()}
    assert largest_relative_difference(end, whole.end) <= FACTOR
    return after


@pytest.mark.parametrize(
    ("first", "second"),
    [*MOVES, *(pytest.param(*move, marks=pytest.mark.slow) for move in SLOW_MOVES)],
    ids=str,
)
def test_an_adapter_goes_on_in_another_layout(
    first: Layout, second: Layout, bench: ParityBench, whole_runs: dict[Case, Outcome], tmp_path: Path
) -> None:
    after = check(bench, ADAPTER, first, second, tmp_path / "run", DROPOUT, whole_runs)
    [notice] = [text for text in after.ranks[0].notices if "another layout" in text]
    assert "→" in notice
    state = json.loads((tmp_path / "run" / f"iter_{STEPS:07d}" / "run_state.json").read_text())
    assert state["layout"]["stages"] == second.placement.describe()
    assert (state["layout"]["tp"], state["layout"]["dp"]) == (second.tp, second.dp)


@pytest.mark.parametrize(
    ("model", "first", "second"),
    [
        ("llama-tied", Layout(pp=2, vpp=2), Layout(tp=2, sequence_parallel=True)),
        ("qwen2", Layout(tp=2, dp=2, distributed_optimizer=True), Layout(pp=2, stages="noops")),
        pytest.param(
            *("llama-tied", Layout(pp=2, dp=2, stages="uneven", distributed_optimizer=True), Layout()),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_all_parameters_go_on_in_another_layout(
    model: str,
    first: Layout,
    second: Layout,
    bench: ParityBench,
    whole_runs: dict[Case, Outcome],
    tmp_path: Path,
) -> None:
    case = Case(model=model, targets=None, recipe=RECIPE)
    check(bench, case, first, second, tmp_path / "run", [], whole_runs)


@pytest.mark.parametrize(
    "layout",
    [
        SP_VPP,
        pytest.param(
            Layout(pp=2, dp=2, vpp=2, distributed_optimizer=True, overlap="gather"), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_in_the_same_layout_no_bit_differs(layout: Layout, bench: ParityBench, tmp_path: Path) -> None:
    extra = [*DROPOUT, "--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
    # A bit that differs does so in the first steps.
    case = Case(recipe=Recipe(steps=SAVED_AT + 2))
    whole = bench.train(case, layout, [*extra, "--lr-decay-iters", str(case.recipe.steps)])
    before, after = stopped_and_taken_up(bench, case, layout, layout, tmp_path / "run", extra)
    assert [*before.losses, *after.losses] == whole.losses
    assert all(after.end[name].equal(tensor) for name, tensor in whole.end.items())
    assert not any("another layout" in text for text in after.ranks[0].notices)


def test_another_micro_batch_goes_on_and_dropout_of_hidden_states_is_told(
    bench: ParityBench, tmp_path: Path
) -> None:
    extra = ["--hidden-dropout", "0.1", "--micro-batch-size"]
    schedule = ["--lr-decay-iters", str(STEPS), "--save", str(tmp_path / "run")]
    bench.train(ADAPTER, Layout(), [*schedule, "--train-iters", "2", *extra, "4"])
    after = bench.train(ADAPTER, Layout(), [*schedule, "--train-iters", "4", "--resume", "auto", *extra, "1"])
    [notice] = [text for text in after.ranks[0].notices if "another layout" in text]
    assert "micro batch size 4 → 1; the masks of hidden and attention dropout are others" in notice
