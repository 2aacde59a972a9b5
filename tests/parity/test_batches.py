"""What must not matter does not: micro-batch size, padding, loss scale, dealing out; and the two loss means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.differences import LOSS_BETWEEN_LAYOUTS, Differences, largest_ratio
from tests.support.layouts import Layout
from tests.support.models import VOCAB_SIZE
from tests.support.parity import Case, ParityBench
from tests.support.reference import Recipe
from tests.support.rows import random_rows, write_rows

CASE = Case()
Within = Callable[[Differences], None]


@pytest.mark.parametrize(
    "flags",
    [
        "--micro-batch-size 1",
        "--micro-batch-size 4",
        "--micro-batch-size 2 --pad-to-multiple-of 1",
        "--micro-batch-size 2 --pad-to-multiple-of 32",
    ],
)
def test_micro_batches_and_padding_change_nothing(flags: str, bench: ParityBench, within: Within) -> None:
    within(bench.compare(CASE, bench.train(CASE, Layout(), flags.split())))


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2, sequence_parallel=True)], ids=str)
def test_rows_padded_to_the_sequence_length(layout: Layout, bench: ParityBench, within: Within) -> None:
    """Without ``--variable-seq-lengths``, and with a length that no row has."""
    flags = [flag for flag in bench.flags(CASE) if flag != "--variable-seq-lengths"]
    start = ["--lora-load", str(bench.starting_adapter(CASE)), "--seq-length", "48"]
    argv = [*flags, *start, *bench.micro_batch_flags(CASE, layout), *layout.flags]
    within(bench.compare(CASE, bench.run(argv, layout, bench.probe())))


@pytest.mark.parametrize(
    ("layout", "rows"),
    [
        (Layout(), 2),
        (Layout(dp=2, distributed_optimizer=True), 1),
        (Layout(tp=2, pp=2), 1),
        (Layout(cp=2, attention="ulysses"), 2),
    ],
    ids=str,
)
def test_mean_of_micro_batch_means(layout: Layout, rows: int, bench: ParityBench, within: Within) -> None:
    case = Case(recipe=Recipe(micro_batch_mean=rows))
    outcome = bench.train(case, layout, ["--loss-normalization", "micro-batch"])
    within(bench.compare(case, outcome))
    over_tokens = bench.reference(CASE).losses
    assert largest_ratio(outcome.losses, over_tokens) > 1e-3, "the two means must differ on these rows"


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sequence_parallel=True)], ids=str)
def test_without_clipping_and_weight_decay(layout: Layout, bench: ParityBench, within: Within) -> None:
    case = Case(recipe=Recipe(clip_grad=0.0, weight_decay=0.0))
    within(bench.compare(case, bench.train(case, layout)))


def test_loss_scale_of_float16_cancels(bench: ParityBench) -> None:
    """The CPU computes --fp16 in fp32, where a loss scale, a power of two, changes no bit."""
    plain = bench.train(CASE, Layout())
    scaled = bench.train(CASE, Layout(), ["--fp16", "--initial-loss-scale", "65536"])
    assert scaled.losses == plain.losses
    assert scaled.grad_norms == plain.grad_norms
    assert all(scaled.end[name].equal(tensor) for name, tensor in plain.end.items())


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(pp=2, dp=2), Layout(tp=2)], ids=str)
def test_shuffled_order_is_that_of_one_process(layout: Layout, bench: ParityBench) -> None:
    flags = [flag for flag in bench.flags(CASE) if flag != "--no-shuffle"]
    flags += ["--lora-load", str(bench.starting_adapter(CASE)), "--micro-batch-size", "2"]
    alone = bench.run(flags, Layout())
    together = bench.run([*flags, *layout.flags], layout)
    assert largest_ratio(together.losses, alone.losses) <= LOSS_BETWEEN_LAYOUTS
    in_file_order = bench.reference(CASE).losses
    assert largest_ratio(alone.losses, in_file_order) > 1e-3, "the rows were not shuffled"


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2, dp=2, distributed_optimizer=True)], ids=str)
def test_a_global_batch_without_loss_is_skipped(layout: Layout, bench: ParityBench, tmp_path: Path) -> None:
    """The run goes on as if that batch were not there: same bits as without its rows."""
    rows = random_rows(12, VOCAB_SIZE, silent=range(4, 8))
    with_silent = write_rows(tmp_path / "with", rows)
    without = write_rows(tmp_path / "without", rows[:4] + rows[8:])
    constant = ["--lr-decay-style", "constant", "--lr-warmup-iters", "0"]
    skipping = bench.train(CASE, layout, [*constant, "--data-path", str(with_silent), "--train-iters", "3"])
    plain = bench.train(CASE, layout, [*constant, "--data-path", str(without), "--train-iters", "2"])
    assert skipping.ranks[0].skipped == [False, True, False]
    assert skipping.ranks[0].loss_tokens[1] == 0
    assert any("no row of the global batch carries loss" in text for text in skipping.ranks[0].notices)
    assert [skipping.losses[0], skipping.losses[2]] == plain.losses
    assert all(skipping.end[name].equal(tensor) for name, tensor in plain.end.items())


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tp=2, sequence_parallel=True, dp=2),
        Layout(pp=4),
        Layout(pp=2, vpp=2),
        Layout(cp=2, dp=2, attention="ring"),
    ],
    ids=str,
)
def test_evaluation_loss_is_the_mean_over_all_rows(layout: Layout, bench: ParityBench) -> None:
    """13 rows fill no batch evenly; the first evaluation is that of the untrained start."""
    flags = ["--valid-data-path", str(bench.data_path), "--eval-iters", "-1", "--train-iters", "4"]
    outcome = bench.train(CASE, layout, flags)
    expected = bench.start_loss(CASE)
    assert outcome.ranks[0].eval_losses[0] == pytest.approx(expected, rel=LOSS_BETWEEN_LAYOUTS)
    assert len(outcome.ranks[0].eval_losses) == 2
