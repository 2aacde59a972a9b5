"""A training job in a layout beside its reference in transformers and PEFT, and how far apart they are.

Tolerances, with what they allow for. Both sides compute in fp32, whose unit is 6e-8; a figure after 20 steps is
the end of thousands of roundings in a row.

- ``LOGITS``: absolute, of logits of size 10; observed up to 3e-5.
- ``LOSS``: each of 20 steps against PEFT. The reference itself in fp32 and in fp64 differs by 5e-7.
- ``LOSS_BETWEEN_LAYOUTS``: the same program, sums in another order: 5e-7 a side, with margin.
- ``GRADIENT``: norm of the difference over the norm, of each A and B. Sums that cancel leave 5e-6.
- ``GRAD_NORM``: of each of 20 steps; in a late one the two sides have trained to slightly different parameters.
- ``FACTOR``: norm of the difference over the norm, of each trained tensor after 20 steps. Adam divides a gradient
  by its own size, so that the relative error of a small one enters whole; observed up to 7e-7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from tests.support.layouts import Layout
from tests.support.models import VOCAB_SIZE, make_model
from tests.support.pool import WorkerPool
from tests.support.reference import LINEARS, Recipe, Reference, ReferenceRecord
from tests.support.rows import random_rows, write_rows
from tests.support.shards import Tensors, assemble, largest_relative_difference
from tests.support.training import Breakage, RankRecord, train_recorded

LOGITS = 1e-4
LOSS = 1e-5
LOSS_BETWEEN_LAYOUTS = 2e-6
GRADIENT = 1e-5
GRAD_NORM = 1e-5
FACTOR = 5e-6

SEQ_LENGTH = 40
NUM_ROWS = 13
"""Divides by no global batch size, so that a batch reaches from one epoch into the next."""
SILENT_ROW = 5
"""Carries no loss: a micro-batch of it, and with DP a whole rank's share of a step, has none."""
NUM_PROBES = 3
RANK, ALPHA = 4, 8


@dataclass(frozen=True)
class Case:
    """What is trained, on which rows, how: everything but the layout."""

    model: str = "llama"
    """A name of ``models.MODELS``."""
    targets: tuple[str, ...] | None = LINEARS
    """Megatron's names of the linears with an adapter; None trains all parameters."""
    recipe: Recipe = Recipe()


@dataclass
class Outcome:
    """A job of ours, of all its ranks."""

    ranks: list[RankRecord]

    @cached_property
    def losses(self) -> list[float]:
        """Of every step; the same on every rank."""
        assert all(rank.losses == self.ranks[0].losses for rank in self.ranks), (
            "ranks report different losses"
        )
        return self.ranks[0].losses

    @cached_property
    def grad_norms(self) -> list[float]:
        """Of every step; the same on every rank."""
        assert all(rank.grad_norms == self.ranks[0].grad_norms for rank in self.ranks), (
            "ranks differ in the norm"
        )
        return self.ranks[0].grad_norms

    @cached_property
    def gradients(self) -> Tensors:
        """Of the first step; replicas are the same bits."""
        return assemble(rank.gradients for rank in self.ranks)

    @cached_property
    def start(self) -> Tensors:
        """Trained parameters before the first step; replicas are the same bits."""
        return assemble(rank.start for rank in self.ranks)

    @cached_property
    def end(self) -> Tensors:
        """Trained parameters after the last step; replicas are the same bits."""
        return assemble(rank.end for rank in self.ranks)

    def logits(self, moment: str) -> torch.Tensor:
        """``[s, b, v]`` at the ``start`` or ``end``; the same on every TP rank of the last stage."""
        found = [logits for rank in self.ranks if (logits := getattr(rank, f"{moment}_logits")) is not None]
        assert all(torch.equal(found[0], other) for other in found[1:]), "ranks differ in the logits"
        return found[0]


@dataclass(frozen=True)
class Differences:
    """How far a job of ours is from its reference."""

    logits: float
    loss: float
    grad_norm: float
    gradient: float
    factor: float

    def __str__(self) -> str:
        return "  ".join(f"{name} {value:.1e}" for name, value in vars(self).items())

    def check(self) -> None:
        """Raises AssertionError, with all figures, where one is above its tolerance."""
        limits = Differences(LOGITS, LOSS, GRAD_NORM, GRADIENT, FACTOR)
        above = [name for name, limit in vars(limits).items() if not getattr(self, name) <= limit]
        assert not above, f"above tolerance: {', '.join(above)}; found {self}; allowed {limits}"


class ParityBench:
    """Makes models, rows and references when first asked for, and trains in layouts on the pool."""

    def __init__(self, folder: Path, workers: WorkerPool) -> None:
        self.folder = folder
        self.workers = workers
        self.rows = random_rows(NUM_ROWS, VOCAB_SIZE, SEQ_LENGTH, silent=[SILENT_ROW])
        self.data_path = write_rows(folder / "rows", self.rows)
        self.probe_rows = [row.input_ids for row in self.rows[:NUM_PROBES]]
        """Their logits are compared."""
        self._references: dict[Case, tuple[ReferenceRecord, Path]] = {}
        self._folders = 0

    def new_folder(self) -> Path:
        """A path that does not exist yet."""
        self._folders += 1
        return self.folder / f"run{self._folders}"

    def model(self, name: str) -> Path:
        """The Hugging Face folder of a tiny model."""
        folder = self.folder / "models" / name
        return folder if folder.is_dir() else make_model(name, folder)

    def reference(self, case: Case) -> ReferenceRecord:
        """The case in transformers and PEFT."""
        return self._reference(case)[0]

    def starting_adapter(self, case: Case) -> Path:
        """The PEFT folder that both sides of a case with an adapter start from."""
        return self._reference(case)[1]

    def _reference(self, case: Case) -> tuple[ReferenceRecord, Path]:
        if case not in self._references:
            reference = Reference(self.model(case.model))
            start = self.new_folder()
            if case.targets is not None:
                reference.add_adapter(RANK, ALPHA, case.targets)
                reference.save_adapter(start)
            record = reference.train(self.rows, case.recipe, self.probe_rows)
            self._references[case] = record, start
        return self._references[case]

    def flags(self, case: Case) -> list[str]:
        """The command line of a case, without a layout and without where an adapter starts."""
        return [
            *("--stage", "sft", "--load", str(self.model(case.model)), "--data-path", str(self.data_path)),
            *("--seq-length", str(SEQ_LENGTH), "--variable-seq-lengths", "--no-shuffle"),
            *("--distributed-timeout-minutes", "1"),
            *case.recipe.flags,
        ]

    def train(
        self, case: Case, layout: Layout, extra: Sequence[str] = (), breakage: Breakage | None = None
    ) -> Outcome:
        """Trains the case in a layout from the reference's starting adapter; ``extra`` flags come last."""
        start = ["--lora-load", str(self.starting_adapter(case))] if case.targets is not None else []
        argv = [*self.flags(case), *start, *self.micro_batch_flags(case, layout), *layout.flags, *extra]
        return self.run(argv, layout, self.probe(), breakage)

    def micro_batch_flags(self, case: Case, layout: Layout) -> list[str]:
        """Two rows at once where that leaves every rank and stage more than one micro-batch."""
        size = case.recipe.micro_batch_mean
        if size is None:
            size = 2 if layout.dp == 1 and layout.pp <= 2 else 1
        return ["--micro-batch-size", str(size)]

    def run(
        self,
        argv: Sequence[str],
        layout: Layout,
        probe: torch.Tensor | None = None,
        breakage: Breakage | None = None,
    ) -> Outcome:
        """Runs a whole command line, which says the same layout."""
        return Outcome(self.workers.run(layout.world_size, train_recorded, argv, probe, breakage))

    def probe(self) -> torch.Tensor:
        """The probe rows ``[b, s]``, padded."""
        tokens = torch.zeros(NUM_PROBES, SEQ_LENGTH, dtype=torch.int64)
        for row, input_ids in zip(tokens, self.probe_rows, strict=True):
            row[: len(input_ids)] = torch.tensor(input_ids)
        return tokens

    def compare(self, case: Case, outcome: Outcome) -> Differences:
        """A job of ours against the reference of its case."""
        reference = self.reference(case)
        return Differences(
            logits=max(
                largest_logit_difference(outcome.logits("start"), reference.start_logits),
                largest_logit_difference(outcome.logits("end"), reference.end_logits),
            ),
            loss=largest_ratio(outcome.losses, reference.losses),
            grad_norm=largest_ratio(outcome.grad_norms, reference.grad_norms),
            gradient=largest_relative_difference(
                self._without_padding(outcome.gradients), reference.gradients
            ),
            factor=largest_relative_difference(self._without_padding(outcome.end), reference.end),
        )

    def _without_padding(self, tensors: Tensors) -> Tensors:
        """Without the rows that a layout adds to the vocabulary, which must be zero."""
        cut = dict(tensors)
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            if name in cut:
                assert not cut[name][VOCAB_SIZE:].any(), f"{name}: its padding is not zero"
                cut[name] = cut[name][:VOCAB_SIZE]
        return cut


def largest_ratio(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference of two lists of the same length."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def largest_logit_difference(found: torch.Tensor, expected: Sequence[torch.Tensor]) -> float:
    """Largest absolute difference of ``[s, b, v]``, rows padded at the end, from the rows' ``[s, v]``."""
    rows = [(found[: len(row), number] - row).abs().max() for number, row in enumerate(expected)]
    return float(torch.stack(rows).max())
