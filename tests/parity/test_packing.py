"""Packed rows train as the same rows one by one in PEFT: prepared and packed while training, in several layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from mindspeed_lora.data.indexed_dataset import IndexedDatasetBuilder
from mindspeed_lora.data.prepared_info import PreparedInfo, text_info_path, to_json
from tests.support.differences import LOSS_BETWEEN_LAYOUTS, Differences, largest_ratio
from tests.support.layouts import Layout
from tests.support.models import VOCAB_SIZE
from tests.support.parity import ALPHA, RANK, Case, Outcome, ParityBench
from tests.support.reference import Recipe, Reference, ReferenceRecord
from tests.support.rows import IGNORED, Row, random_rows

RECIPE = Recipe()
CASE = Case(recipe=RECIPE)
PACKED_LENGTH = 88
"""Two or three of the bench's rows, which have up to 40 tokens."""
LAYOUTS = [
    Layout(),
    Layout(tp=2, sequence_parallel=True, recompute="uniform"),
    Layout(pp=2, vpp=2, recompute="block"),
    Layout(tp=2, dp=2, distributed_optimizer=True),
    Layout(tp=2, pp=2, sequence_parallel=True, recompute="selective"),
    Layout(cp=2, attention="ring", tp=2, sequence_parallel=True),
    Layout(cp=4, attention="hybrid"),
]
OTHERS = [
    Layout(cp=4, attention="ring"),
    Layout(cp=2, attention="ulysses", dp=2, distributed_optimizer=True),
    Layout(cp=2, attention="ring", pp=2, recompute="uniform"),
    Layout(dp=4),
    Layout(pp=2, dp=2),
    Layout(pp=4),
    Layout(tp=4),
    Layout(tp=2, pp=2, vpp=2),
]
SLOW = [pytest.param(layout, marks=pytest.mark.slow) for layout in OTHERS]
PREPARED_SLOW = [pytest.param(layout, marks=pytest.mark.slow) for layout in [*LAYOUTS[1::2], *OTHERS]]
Within = Callable[[Differences], None]


class TestWhileTraining:
    """``--packing``."""

    FLAGS = ("--packing", "--seq-length", str(PACKED_LENGTH))

    @pytest.mark.parametrize("layout", [*LAYOUTS, *SLOW], ids=str)
    def test_layout_is_exact(self, layout: Layout, bench: ParityBench, within: Within) -> None:
        within(bench.compare(CASE, bench.train(CASE, layout, self.FLAGS)))

    @pytest.mark.parametrize(
        "flags",
        ["--micro-batch-size 1 --pad-to-multiple-of 1", "--micro-batch-size 4 --seq-length 40"],
    )
    def test_rows_and_padding_change_nothing(self, flags: str, bench: ParityBench, within: Within) -> None:
        within(bench.compare(CASE, bench.train(CASE, Layout(), [*self.FLAGS, *flags.split()])))

    def test_interleaved_stages_get_whole_rounds(self, bench: ParityBench, within: Within) -> None:
        """Five rows make one packed row or two, and the schedule wants an even number of micro-batches."""
        case = replace(CASE, recipe=replace(RECIPE, global_batch_size=5))
        flags = [*self.FLAGS, "--micro-batch-size", "1", "--seq-length", "128"]
        within(bench.compare(case, bench.train(case, Layout(pp=2, vpp=2), flags)))

    @pytest.mark.parametrize("model", ["mistral-window", "llama-tied", "phi3-longrope"])
    def test_other_models(self, model: str, bench: ParityBench, within: Within) -> None:
        """A window of attention is counted inside of each row, and so is the length that longrope asks."""
        case = replace(CASE, model=model)
        within(bench.compare(case, bench.train(case, Layout(), self.FLAGS)))

    @pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2, sequence_parallel=True)], ids=str)
    def test_rows_filled_to_the_sequence_length(
        self, layout: Layout, bench: ParityBench, within: Within
    ) -> None:
        flags = [flag for flag in bench.flags(CASE) if flag != "--variable-seq-lengths"]
        start = ["--lora-load", str(bench.starting_adapter(CASE)), "--micro-batch-size", "2"]
        argv = [*flags, *start, *layout.flags, *self.FLAGS]
        within(bench.compare(CASE, bench.run(argv, layout, bench.probe())))

    @pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, dp=2), Layout(pp=4)], ids=str)
    def test_evaluation(self, layout: Layout, bench: ParityBench) -> None:
        flags = ["--valid-data-path", str(bench.data_path), "--eval-iters", "-1", "--train-iters", "4"]
        outcome = bench.train(CASE, layout, [*self.FLAGS, *flags])
        expected = bench.start_loss(CASE)
        assert outcome.ranks[0].eval_losses[0] == pytest.approx(expected, rel=LOSS_BETWEEN_LAYOUTS)


@dataclass(frozen=True)
class PreparedCase:
    """Prepared rows, the reference's record of them, and the command line that trains on them."""

    record: ReferenceRecord
    probe_rows: list[list[int]]
    flags: list[str]


def train(case: PreparedCase, layout: Layout, bench: ParityBench, extra: Sequence[str] = ()) -> Outcome:
    micro_batch = ["--micro-batch-size", "1" if layout.dp > 1 or layout.pp > 1 else "2"]
    return bench.run([*case.flags, *micro_batch, *layout.flags, *extra], layout, bench.probe())


def compare(case: PreparedCase, outcome: Outcome) -> Differences:
    return Differences.between(outcome.record([len(row) for row in case.probe_rows]), case.record)


def reference(
    bench: ParityBench, rows: Sequence[Row], rows_a_batch: int, folder: Path
) -> tuple[ReferenceRecord, list[str]]:
    """The record, and the flags of the same model, adapter and recipe."""
    made = Reference(bench.model("llama"))
    made.add_adapter(RANK, ALPHA)
    start = made.save_adapter(folder / "start")
    record = made.train(rows, replace(RECIPE, global_batch_size=rows_a_batch), bench.probe_rows)
    flags = ["--load", str(bench.model("llama")), "--lora-load", str(start), "--no-shuffle"]
    return record, [*flags, *RECIPE.flags]


def write_packed(prefix: Path, pairs: Sequence[Sequence[Row]], neat: bool) -> Path:
    """Rows as MindSpeed-LLM packs them: the label of a row's first token stays."""
    builders = {
        key: IndexedDatasetBuilder(f"{prefix}_packed_{key}_document")
        for key in ("input_ids", "attention_mask", "labels")
    }
    for rows in pairs:
        numbers = [[number if neat else 1] * len(row.input_ids) for number, row in enumerate(rows, start=1)]
        left = PACKED_LENGTH - sum(len(row.input_ids) for row in rows)
        builders["input_ids"].add_document(sum((row.input_ids for row in rows), []) + [0] * left)
        builders["labels"].add_document(sum((row.labels for row in rows), []) + [IGNORED] * left)
        builders["attention_mask"].add_document(sum(numbers, []) + [0] * left)
    for builder in builders.values():
        builder.publish()
    return prefix


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Row, Row]]:
    """Rows two by two; every other one carries loss from its very first token on."""
    rows = random_rows(14, VOCAB_SIZE, seed=8)
    rows = [Row(row.input_ids, row.input_ids) if i % 2 else row for i, row in enumerate(rows)]
    return list(zip(rows[::2], rows[1::2], strict=True))


@pytest.fixture(scope="module")
def neat(
    bench: ParityBench, pairs: list[tuple[Row, Row]], tmp_path_factory: pytest.TempPathFactory
) -> PreparedCase:
    """Neat-packed pairs; the reference takes each row by itself."""
    folder = tmp_path_factory.mktemp("neat")
    size = RECIPE.global_batch_size
    record, flags = reference(bench, [row for pair in pairs for row in pair], 2 * size, folder)
    data = write_packed(folder / "rows", pairs, neat=True)
    flags += ["--stage", "sft", "--data-path", str(data), "--seq-length", str(PACKED_LENGTH)]
    return PreparedCase(record, bench.probe_rows, flags)


@pytest.fixture(scope="module")
def plain(
    bench: ParityBench, pairs: list[tuple[Row, Row]], tmp_path_factory: pytest.TempPathFactory
) -> PreparedCase:
    """Plainly packed pairs; the reference runs attention, positions and loss through both."""
    folder = tmp_path_factory.mktemp("plain")
    joined = [Row(a.input_ids + b.input_ids, a.labels + b.labels) for a, b in pairs]
    record, flags = reference(bench, joined, RECIPE.global_batch_size, folder)
    data = write_packed(folder / "rows", pairs, neat=False)
    flags += ["--stage", "sft", "--data-path", str(data), "--seq-length", str(PACKED_LENGTH)]
    return PreparedCase(record, bench.probe_rows, flags)


class TestPrepared:
    """Rows of ``preprocess_data.py``, and of others that lay them out so."""

    @pytest.mark.parametrize("layout", [*LAYOUTS[::2], *PREPARED_SLOW], ids=str)
    def test_neat_rows_are_their_sub_rows(
        self, layout: Layout, neat: PreparedCase, bench: ParityBench, within: Within
    ) -> None:
        within(compare(neat, train(neat, layout, bench)))

    @pytest.mark.parametrize(
        "flags",
        ["--neat-pack --reset-attention-mask --reset-position-ids", "--variable-seq-lengths", "--packing"],
    )
    def test_what_changes_nothing_on_neat_rows(
        self, flags: str, neat: PreparedCase, bench: ParityBench, within: Within
    ) -> None:
        within(compare(neat, train(neat, Layout(), bench, flags.split())))

    @pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2, sequence_parallel=True)], ids=str)
    def test_plain_rows_run_through(
        self, layout: Layout, plain: PreparedCase, bench: ParityBench, within: Within
    ) -> None:
        within(compare(plain, train(plain, layout, bench)))

    def test_the_two_differ(self, plain: PreparedCase, neat: PreparedCase) -> None:
        assert largest_ratio(plain.record.losses, neat.record.losses) > 1e-3


WINDOW, END = 24, 2


@pytest.fixture(scope="module")
def text(bench: ParityBench, tmp_path_factory: pytest.TempPathFactory) -> PreparedCase:
    """Documents that lie in a window two by two, and reach from one window into the next.

    The reference takes each part by itself; its last token predicts the next document's first, as in Megatron.
    """
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.RandomState(4)
    builder = IndexedDatasetBuilder(folder / "text")
    tokens: list[int] = []
    for _ in range(9):
        for length in (10, 20, 18):
            document = [*generator.randint(3, VOCAB_SIZE, size=length - 1).tolist(), END]
            builder.add_document(document)
            tokens += document
    builder.publish()
    info = PreparedInfo(tokenizer_fingerprint="", handler_name="", eos_token_id=END)
    text_info_path(folder / "text").write_text(to_json(info))
    parts = []
    for first in range(0, len(tokens) - WINDOW, WINDOW):
        end = tokens.index(END, first) + 1
        parts += [tokens[first : end + 1], tokens[end : first + WINDOW + 1]]
    size = RECIPE.global_batch_size
    record, flags = reference(bench, [Row(part, part) for part in parts], 2 * size, folder)
    flags += ["--stage", "pretrain", "--data-path", str(folder / "text"), "--seq-length", str(WINDOW)]
    return PreparedCase(record, bench.probe_rows, flags)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2, sequence_parallel=True)], ids=str)
@pytest.mark.parametrize(
    "flags", [["--reset-attention-mask"], ["--reset-attention-mask", "--reset-position-ids"]]
)
def test_documents_of_plain_text(
    flags: list[str], layout: Layout, text: PreparedCase, bench: ParityBench, within: Within
) -> None:
    """Rotary positions only matter relative to each other, so that the second flag changes nothing."""
    outcome = train(text, layout, bench, flags)
    within(compare(text, outcome))
    assert outcome.ranks[0].loss_tokens == [RECIPE.global_batch_size * WINDOW] * RECIPE.steps
