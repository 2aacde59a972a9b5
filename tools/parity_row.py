"""A row of the parity matrix: what one layout gave, and when that is exact."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

from tests.support.differences import GRADIENT, LOGITS, LOSS, largest_logit_difference
from tests.support.layouts import Layout
from tests.support.parity import Case, Outcome, ParityBench
from tests.support.pool import RankFailed
from tests.support.reference import Reference

PATIENT = ("--distributed-timeout-minutes", "5")
"""Eight ranks on two cores can let each other wait for longer than tests allow."""
_TOLERANCES = {"loss": LOSS, "gradient": GRADIENT, "logits": LOGITS}
_NOT_THERE = float("nan")


def figure(heading: str) -> float:
    """A difference from the reference, whose field's last word says which tolerance it has."""
    value: float = field(default=_NOT_THERE, metadata={"heading": heading})
    return value


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one layout gave; a kind of rows adds the figures of its further runs."""

    name: str
    ranks: int
    loss: float = figure("loss, 20 steps")
    """Largest relative difference over the steps."""
    gradient: float = figure("gradient")
    """Largest over all factors, norm of the difference over the norm."""
    logits: float = figure("logits by PEFT")
    """Largest absolute difference between ours after training and those of PEFT with the saved adapter."""
    fusion: str = ""
    """Which schedule the fused run had."""
    fused_loss: float = figure("loss, fused")
    fused_gradient: float = figure("gradient, fused")
    replicas: str = "differ"
    seconds: float = 0.0
    problem: str = ""
    TITLE: ClassVar[str] = "layout"

    @classmethod
    def figures(cls) -> dict[str, str]:
        """Field of every figure → its heading, those of the fused run last."""
        found = {one.name: one.metadata["heading"] for one in fields(cls) if "heading" in one.metadata}
        return dict(sorted(found.items(), key=lambda item: item[0].startswith("fused")))

    @property
    def exact(self) -> bool:
        """Whether every figure is within the tolerance of the tests."""
        return not self.problem and all(
            getattr(self, name) <= _TOLERANCES[name.rpartition("_")[2]] for name in self.figures()
        )

    @classmethod
    def heading(cls) -> list[str]:
        """Of the table."""
        figures = cls.figures()
        plain = [text for name, text in figures.items() if not name.startswith("fused")]
        fused = [text for name, text in figures.items() if name.startswith("fused")]
        return [cls.TITLE, "ranks", *plain, "--lora-fusion", *fused, "replicas", "exact", "s"]

    @property
    def cells(self) -> list[str]:
        """Of the table."""
        figures = self.figures()
        plain, fused = (
            [f"{getattr(self, name):.1e}" for name in figures if name.startswith("fused") is is_fused]
            for is_fused in (False, True)
        )
        verdict = "yes" if self.exact else f"NO {self.problem}".strip()
        return [
            self.name,
            str(self.ranks),
            *plain,
            self.fusion,
            *fused,
            self.replicas,
            verdict,
            f"{self.seconds:.0f}",
        ]


FAILURES = (AssertionError, RankFailed)
"""What a layout that is not exact may raise, in place of figures."""


def sentence(error: Exception) -> str:
    """One line on why a layout has no figures."""
    return str(error).strip().splitlines()[-1][:120]


def rows_of_a_step(layout: Layout) -> int:
    """Four, or as many as give interleaved stages a micro-batch for each pipeline rank."""
    return max(4, layout.dp * layout.pp) if layout.vpp > 1 else 4


def difference_by_peft(bench: ParityBench, case: Case, outcome: Outcome, save: Path) -> float:
    """Between our logits after training and those of PEFT with the adapter that was saved."""
    reference = Reference(bench.model(case.model))
    reference.load_adapter(save / "adapter")
    theirs = [reference.logits(row) for row in bench.probe_rows]
    ours = [outcome.logits("end")[: len(row), number] for number, row in enumerate(bench.probe_rows)]
    return largest_logit_difference(ours, theirs)
