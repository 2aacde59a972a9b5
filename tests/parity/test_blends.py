"""A blend trains as its samples one by one, in the order that megatron-core's rule gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from mindspeed_lora.training.reporting.metrics import read_metrics
from tests.support.differences import LOSS_BETWEEN_LAYOUTS, Differences
from tests.support.layouts import Layout
from tests.support.models import VOCAB_SIZE
from tests.support.parity import SEQ_LENGTH, Outcome, ParityBench
from tests.support.prepared import PreparedRun
from tests.support.reference import Recipe, Reference, ReferenceRecord
from tests.support.rows import Row, random_rows, write_rows
from tests.support.training import train

RECIPE = Recipe()
SIZES = (5, 9)
SHARES = (0.3, 0.7)
LAYOUTS = [
    (Layout(), ()),
    (Layout(tp=2, dp=2, distributed_optimizer=True), ()),
    (Layout(pp=2, dp=2), ("--packing", "--seq-length", "88")),
]
IDS = ["single", "tp2-dp2", "pp2-dp2-packing"]
Within = Callable[[Differences], None]


def greedy(shares: Sequence[float], count: int) -> list[int]:
    """Whose turn it is: of the part that is furthest behind its share."""
    turns: list[int] = []
    for sample in range(count):
        errors = [share * max(sample, 1) - turns.count(part) for part, share in enumerate(shares)]
        turns.append(errors.index(max(errors)))
    return turns


@dataclass(frozen=True)
class Blend:
    """Two prepared sets."""

    run: PreparedRun
    parts: tuple[list[Row], list[Row]]
    prefixes: tuple[Path, Path]

    def in_order(self, turns: Sequence[int]) -> list[Row]:
        """The rows of a run whose samples come from these parts in turn, each in file order around and around."""
        taken = [0, 0]
        rows = []
        for part in turns:
            rows.append(self.parts[part][taken[part] % SIZES[part]])
            taken[part] += 1
        return rows

    def reference(self, turns: Sequence[int]) -> ReferenceRecord:
        return self.run.reference(self.in_order(turns), RECIPE)

    def train(self, words: Sequence[str], layout: Layout, extra: Sequence[str] = ()) -> Outcome:
        return self.run.train(words, RECIPE, layout, extra)


@pytest.fixture(scope="module")
def blend(bench: ParityBench, tmp_path_factory: pytest.TempPathFactory) -> Blend:
    folder = tmp_path_factory.mktemp("blend")
    parts = tuple(random_rows(size, VOCAB_SIZE, SEQ_LENGTH, seed=size) for size in SIZES)
    prefixes = tuple(write_rows(folder / f"part{number}", rows) for number, rows in enumerate(parts))
    return Blend(PreparedRun.made(bench, folder), parts, prefixes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def weighted(blend: Blend) -> ReferenceRecord:
    return blend.reference(greedy(SHARES, RECIPE.steps * RECIPE.global_batch_size))


@pytest.mark.parametrize(("layout", "extra"), LAYOUTS, ids=IDS)
def test_weights(
    layout: Layout, extra: Sequence[str], blend: Blend, weighted: ReferenceRecord, within: Within
) -> None:
    words = ["0.3", str(blend.prefixes[0]), "0.7", str(blend.prefixes[1])]
    within(blend.run.differences(blend.train(words, layout, extra), weighted))


def test_sizes(blend: Blend, within: Within) -> None:
    """Fourteen rows an epoch: twenty-four samples reach into the second one."""
    total = sum(SIZES)
    epoch = greedy([size / total for size in SIZES], total)
    assert [epoch.count(part) for part in (0, 1)] == list(SIZES)
    record = blend.reference((epoch * 2)[: RECIPE.steps * RECIPE.global_batch_size])
    within(blend.run.differences(blend.train(list(map(str, blend.prefixes)), Layout(dp=2)), record))


def test_evaluation_and_test_loss(blend: Blend) -> None:
    """All rows of both; some global batches in the proportions of the weights."""
    words = ["1", str(blend.prefixes[0]), "3", str(blend.prefixes[1])]
    flags = ["--valid-data-path", *words, "--test-data-path", str(blend.prefixes[1]), "--train-iters", "4"]
    found = blend.train(words, Layout(dp=2), [*flags, "--eval-iters", "2"])
    reference = Reference(blend.run.bench.model("llama"))
    reference.load_adapter(blend.run.start)
    expected = reference.loss(blend.in_order(greedy([0.25, 0.75], 8)))
    assert found.ranks[0].eval_losses[0] == pytest.approx(expected, rel=LOSS_BETWEEN_LAYOUTS)
    whole = blend.train(words, Layout(), [*flags, "--eval-iters", "-1", "--lr", "0", "--min-lr", "0"])
    both, second = (reference.loss(rows) for rows in ([*blend.parts[0], *blend.parts[1]], blend.parts[1]))
    assert whole.ranks[0].eval_losses[0] == pytest.approx(both, rel=LOSS_BETWEEN_LAYOUTS)
    assert whole.ranks[0].eval_losses[-1] == pytest.approx(second, rel=LOSS_BETWEEN_LAYOUTS), "the test rows"


def test_the_third_share_of_the_split_is_logged(blend: Blend, tmp_path: Path) -> None:
    """At a learning rate of zero the losses at the end are those of the start, each over its own rows."""
    layout = Layout(dp=2)
    flags = ["--split", "5,2,2", "--eval-iters", "-1", "--lr", "0", "--min-lr", "0", "--train-iters", "1"]
    flags += ["--lr-warmup-iters", "0"]
    flags += ["--save", str(tmp_path / "run")]
    argv = blend.run.argv([str(blend.prefixes[1])], RECIPE, layout, flags)
    assert blend.run.bench.workers.run(layout.world_size, train, argv) == [0, 0]
    reference = Reference(blend.run.bench.model("llama"))
    reference.load_adapter(blend.run.start)
    logged = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    for part, rows in (("eval", blend.parts[1][5:7]), ("test", blend.parts[1][7:])):
        (*_, record) = [one for one in logged if f"{part}_loss" in one]
        assert record["iteration"] == 1
        assert record[f"{part}_tokens"] == sum(row.num_loss_tokens for row in rows)
        assert record[f"{part}_loss"] == pytest.approx(reference.loss(rows), rel=LOSS_BETWEEN_LAYOUTS)
    assert sum("test_loss" in record for record in logged) == 1
