"""A tiny Llama with an adapter to start from, trained by us and by the reference on prepared sets of a test's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.differences import Differences
from tests.support.layouts import Layout
from tests.support.parity import ALPHA, RANK, SEQ_LENGTH, Case, Outcome, ParityBench
from tests.support.reference import Recipe, Reference, ReferenceRecord
from tests.support.rows import Row


@dataclass(frozen=True)
class PreparedRun:
    """The model and where its adapter starts."""

    bench: ParityBench
    start: Path

    @classmethod
    def made(cls, bench: ParityBench, folder: Path) -> PreparedRun:
        """With a new adapter in ``folder``."""
        reference = Reference(bench.model("llama"))
        reference.add_adapter(RANK, ALPHA)
        return cls(bench, reference.save_adapter(folder / "start"))

    def reference(self, rows: Sequence[Row], recipe: Recipe) -> ReferenceRecord:
        """The reference on these rows in this order."""
        made = Reference(self.bench.model("llama"))
        made.load_adapter(self.start)
        return made.train(rows, recipe, self.bench.probe_rows)

    def train(
        self, data: Sequence[str], recipe: Recipe, layout: Layout, extra: Sequence[str] = ()
    ) -> Outcome:
        """Ours with the words ``data`` behind ``--data-path``."""
        return self.bench.run(self.argv(data, recipe, layout, extra), layout, self.bench.probe())

    def argv(
        self, data: Sequence[str], recipe: Recipe, layout: Layout, extra: Sequence[str] = ()
    ) -> list[str]:
        """The command line of that."""
        return [
            *("--stage", "sft", "--load", str(self.bench.model("llama")), "--lora-load", str(self.start)),
            *(
                "--data-path",
                *data,
                "--no-shuffle",
                "--seq-length",
                str(SEQ_LENGTH),
                "--variable-seq-lengths",
            ),
            *("--distributed-timeout-minutes", "3"),
            *self.bench.micro_batch_flags(Case(recipe=recipe), layout),
            *recipe.flags,
            *layout.flags,
            *extra,
        ]

    def differences(self, outcome: Outcome, record: ReferenceRecord) -> Differences:
        """Ours against the reference."""
        return Differences.between(outcome.record([len(row) for row in self.bench.probe_rows]), record)
