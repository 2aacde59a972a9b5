"""Labels with weights train as in PEFT with the weighted mean: in every layout, packed, and in an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.differences import LOSS_BETWEEN_LAYOUTS, Differences
from tests.support.layouts import Layout
from tests.support.models import VOCAB_SIZE
from tests.support.parity import SEQ_LENGTH, Outcome, ParityBench
from tests.support.prepared import PreparedRun
from tests.support.reference import Recipe, Reference, ReferenceRecord
from tests.support.rows import Row, random_rows, write_rows

RECIPE = Recipe()
LAYOUTS = [
    Layout(),
    Layout(tp=2, sequence_parallel=True, recompute="uniform", fusion="chunks"),
    Layout(pp=2, vpp=2),
    Layout(tp=2, dp=2, distributed_optimizer=True),
    Layout(cp=2, attention="ring", tp=2, sequence_parallel=True, fusion="fused"),
]
OTHERS = [
    Layout(tp=4),
    Layout(dp=4),
    Layout(tp=2, pp=2, fusion="published"),
    Layout(cp=4, attention="hybrid"),
    Layout(cp=2, attention="ulysses", pp=2),
]
SLOW = [pytest.param(layout, marks=pytest.mark.slow) for layout in OTHERS]
PACKING = ("--packing", "--seq-length", "88")
Within = Callable[[Differences], None]


def weighted_rows(count: int) -> list[Row]:
    """Random rows: one without loss, one without weights, the labels of all others with weights from 0.1 to 4 or 0."""
    generator = np.random.RandomState(8)
    rows = random_rows(count, VOCAB_SIZE, SEQ_LENGTH, silent=[2])
    weighted = []
    for row in rows:
        drawn = np.exp(generator.uniform(np.log(0.1), np.log(4.0), len(row.labels)))
        drawn[generator.uniform(size=len(row.labels)) < 0.1] = 0.0
        weighted.append(replace(row, weights=tuple(drawn.astype(np.float32).tolist())))
    weighted[4] = rows[4]
    return weighted


@dataclass(frozen=True)
class Weighted:
    """Rows with weights, and the reference's record of them."""

    run: PreparedRun
    rows: list[Row]
    prefix: Path

    def reference(self, recipe: Recipe) -> ReferenceRecord:
        return self.run.reference(self.rows, recipe)

    def train(self, recipe: Recipe, layout: Layout, extra: Sequence[str] = ()) -> Outcome:
        return self.run.train([str(self.prefix)], recipe, layout, extra)


@pytest.fixture(scope="module")
def weighted(bench: ParityBench, tmp_path_factory: pytest.TempPathFactory) -> Weighted:
    folder = tmp_path_factory.mktemp("weighted")
    rows = weighted_rows(11)
    return Weighted(PreparedRun.made(bench, folder), rows, write_rows(folder / "rows", rows))


@pytest.fixture(scope="module")
def record(weighted: Weighted) -> ReferenceRecord:
    return weighted.reference(RECIPE)


@pytest.mark.parametrize("layout", [*LAYOUTS, *SLOW], ids=str)
def test_layout_is_exact(layout: Layout, weighted: Weighted, record: ReferenceRecord, within: Within) -> None:
    within(weighted.run.differences(weighted.train(RECIPE, layout), record))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tp=2, dp=2),
        pytest.param(Layout(cp=2, attention="ring", pp=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_packed_while_training(
    layout: Layout, weighted: Weighted, record: ReferenceRecord, within: Within
) -> None:
    within(weighted.run.differences(weighted.train(RECIPE, layout, PACKING), record))


def test_mean_of_micro_batches(weighted: Weighted, within: Within) -> None:
    """Each micro-batch's weighted mean counts the same; under CP a rank's share must not be divided by its own sum."""
    recipe = replace(RECIPE, micro_batch_mean=2)
    layout = Layout(cp=2, attention="ring", dp=2)
    flags = ["--micro-batch-size", "2", "--loss-normalization", "micro-batch"]
    within(weighted.run.differences(weighted.train(recipe, layout, flags), weighted.reference(recipe)))


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2, pp=2)], ids=str)
def test_evaluation(layout: Layout, weighted: Weighted) -> None:
    flags = ["--valid-data-path", str(weighted.prefix), "--eval-iters", "-1", "--train-iters", "4"]
    outcome = weighted.train(RECIPE, layout, flags)
    made = Reference(weighted.run.bench.model("llama"))
    made.load_adapter(weighted.run.start)
    assert outcome.ranks[0].eval_losses[0] == pytest.approx(
        made.loss(weighted.rows), rel=LOSS_BETWEEN_LAYOUTS
    )


def test_weights_matter(weighted: Weighted, record: ReferenceRecord) -> None:
    """The comparison would see it if they were left out."""
    plain = [replace(row, weights=None) for row in weighted.rows]
    without = replace(weighted, rows=plain).reference(RECIPE)
    assert max(abs(a - b) for a, b in zip(without.losses, record.losses, strict=True)) > 1e-2
