"""The rows of the parity matrix for mixtures of experts: how experts are cut × how the rest is, against PEFT.

Each is trained three times: as it is, with ``--moe-alltoall-overlap-comm``, and with that and ``--lora-fusion``. PEFT
knows no dropout on experts, so that these rows have none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from parity_row import FAILURES, PATIENT, Row, difference_by_peft, figure, rows_of_a_step, sentence

from tests.support.expert_layouts import OVERLAP, ExpertLayout, expert_layouts
from tests.support.layouts import UNFUSED, Layout, fusions
from tests.support.models import EXPERTS
from tests.support.parity import Case, ParityBench
from tests.support.reference import LINEARS, Recipe

LATENT = (
    *("linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj"),
    *("linear_proj", "linear_fc1", "linear_fc2"),
)
"""The linears of a model with latent attention."""
FAMILIES = (*EXPERTS, "deepseek-v2-moe", "deepseek-v3-moe")
CUTS = (
    ExpertLayout(Layout(tp=2, sequence_parallel=True), ep=2, etp=1),
    ExpertLayout(Layout(tp=2, dp=2, sequence_parallel=True), ep=2, etp=2),
)
"""What every family is trained in; the first one in all layouts."""


@dataclass(frozen=True, kw_only=True)
class ExpertRow(Row):
    """What one layout of a model with experts gave."""

    overlapped_loss: float = figure("loss, overlap")
    overlapped_gradient: float = figure("gradient, overlap")
    TITLE: ClassVar[str] = "model and layout"


@dataclass(frozen=True)
class Job:
    """One row to measure."""

    model: str
    cut: ExpertLayout

    def __str__(self) -> str:
        return f"{self.model} {self.cut}"

    @property
    def ranks(self) -> int:
        """Its processes."""
        return self.cut.layout.world_size

    @property
    def case(self) -> Case:
        """What is trained. The random experts of DeepSeek make what Adam leaves of rounding grow: smaller steps."""
        rows = rows_of_a_step(self.cut.layout)
        if self.model.startswith("deepseek"):
            return Case(self.model, LATENT, recipe=Recipe(global_batch_size=rows, lr=2e-4, min_lr=2e-5))
        return Case(self.model, LINEARS, recipe=Recipe(global_batch_size=rows))


def choose(ranks: Sequence[int], only: str | None) -> list[Job]:
    """The rows of these numbers of ranks, by number of ranks; the families but the first take turns with layouts."""
    first, *others = FAMILIES
    jobs = [Job(first, cut) for cut in expert_layouts(max(ranks))]
    jobs += [Job(model, cut) for model in others for cut in CUTS]
    found = [job for job in jobs if job.ranks in ranks and (only is None or only in str(job))]
    return sorted(found, key=lambda job: job.ranks)


def measure(bench: ParityBench, job: Job, turn: int) -> ExpertRow:
    """One row: trained three times, compared, saved and loaded by PEFT."""
    started = time.monotonic()
    save, case, cut = bench.new_folder(), job.case, job.cut
    schedules = [name for name in fusions(cut.layout.tp) if name != UNFUSED]
    fused = replace(cut.layout, fusion=schedules[turn % len(schedules)])
    flags = [*PATIENT, *cut.flags]
    try:
        outcome = bench.train(case, cut.layout, [*flags, "--save", str(save)])
        plain = bench.compare(case, outcome)
        overlapped = bench.compare(case, bench.train(case, cut.layout, [*flags, OVERLAP]))
        by_fusion = bench.compare(case, bench.train(case, fused, [*flags, OVERLAP]))
        logits = difference_by_peft(bench, case, outcome, save)
    except FAILURES as error:
        seconds = time.monotonic() - started
        return ExpertRow(name=str(job), ranks=job.ranks, problem=sentence(error), seconds=seconds)
    return ExpertRow(
        name=str(job),
        ranks=job.ranks,
        loss=plain.loss,
        gradient=plain.gradient,
        logits=logits,
        overlapped_loss=overlapped.loss,
        overlapped_gradient=overlapped.gradient,
        fusion=fused.fusion,
        fused_loss=by_fusion.loss,
        fused_gradient=by_fusion.gradient,
        replicas="bit-equal",
        seconds=time.monotonic() - started,
    )


def text() -> list[str]:
    """What the rows are."""
    return [
        "## Mixtures of experts",
        "",
        "The same for models with 4 experts (DeepSeek: 8), adapters on each of them, without dropout, which PEFT has "
        f"none of on experts: as it is, with {OVERLAP}, and with that and --lora-fusion. The gradient is that of any "
        "expert's factors too, compared by the expert's number in the whole model; every rank has other rows.",
        "",
        "ep: expert parallel, etp: TP ranks of an expert; the dispatcher where it is not alltoall; DeepSeek has latent "
        "attention and its adapters.",
    ]
