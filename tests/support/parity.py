"""A training job in a layout beside its reference in transformers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from tests.support.differences import Differences
from tests.support.layouts import Layout
from tests.support.models import VOCAB_SIZE, make_model
from tests.support.pool import WorkerPool
from tests.support.quantized import Quant
from tests.support.reference import LINEARS, Recipe, Reference, ReferenceRecord
from tests.support.rows import random_rows, write_rows
from tests.support.shards import Tensors, assemble
from tests.support.training import Breakage, RankRecord, train_recorded

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
    peft: str | None = None
    """In place of ``targets``: keywords of PEFT's ``LoraConfig`` as JSON, for an adapter as PEFT makes it."""
    recipe: Recipe = Recipe()
    quant: Quant | None = None
    """How the base is quantised; None: it is not."""
    resize: int | None = None
    """With ``peft``: so many words has the model that PEFT makes the adapter for; the base on disk stays as it is."""


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

    def record(self, lengths: Sequence[int]) -> ReferenceRecord:
        """What the reference tells too, its probe rows of these lengths."""
        start, end = (
            [logits[:length, row] for row, length in enumerate(lengths)]
            for logits in (self.logits("start"), self.logits("end"))
        )
        return ReferenceRecord(self.losses, self.grad_norms, self.gradients, self.end, start, end)


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

    def start_loss(self, case: Case) -> float:
        """Mean loss per loss-carrying token of all rows, with the starting adapter."""
        reference = Reference(self.model(case.model))
        if case.targets is not None:
            reference.load_adapter(self.starting_adapter(case), tied=case.peft is None)
        return reference.loss(self.rows)

    def _reference(self, case: Case) -> tuple[ReferenceRecord, Path]:
        if case not in self._references:
            reference = Reference(self.model(case.model), quant=case.quant)
            start = self.new_folder()
            if case.resize is not None:
                reference.resize(case.resize)
            if case.peft is not None:
                reference.add_peft_adapter(**{"r": RANK, "lora_alpha": ALPHA, **json.loads(case.peft)})
                reference.save_adapter(start)
            elif case.targets is not None:
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
            *("--distributed-timeout-minutes", "3"),
            *case.recipe.flags,
            *(case.quant.flags if case.quant is not None else []),
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
            size = 2 if layout.dp == 1 and layout.pp * layout.vpp <= 2 else 1
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
        found = outcome.record([len(logits) for logits in reference.start_logits])
        words = case.resize or VOCAB_SIZE
        found.gradients = _without_padding(found.gradients, words)
        found.end = _without_padding(found.end, words)
        return Differences.between(found, reference)


def _without_padding(tensors: Tensors, words: int) -> Tensors:
    """Without the rows that a layout adds to the vocabulary, which must be zero."""
    cut = dict(tensors)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in cut:
            assert not cut[name][words:].any(), f"{name}: its padding is not zero"
            cut[name] = cut[name][:words]
    return cut
