"""Every kind of parallel layout against transformers + PEFT: one table, and exit status 1 where one is not exact.

    python tools/parity_matrix.py --ranks 1 2 4                the layouts of 1, 2 and 4 ranks
    python tools/parity_matrix.py --ranks 1 2 4 8 --output docs/parity.md
    python tools/parity_matrix.py --ranks 2 --only tp2 --all   those whose name has tp2, in every variation

A small Llama is trained for 20 steps over real process groups (gloo), from one PEFT adapter, on the same rows as
its reference, which is one process of transformers + PEFT in float32: without dropout, with dropout of the adapter's
input, where PEFT gets our masks, and with --lora-fusion. Degrees are crossed; recomputation, stage sizes and overlap
take turns unless ``--all`` crosses them too, and so do the schedules of --lora-fusion.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from comparison.machine import commit, machine, versions  # noqa: E402
from comparison.table import table  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from mindspeed_lora.atomic import atomic_file  # noqa: E402
from tests.support.differences import GRADIENT, LOGITS, LOSS, largest_logit_difference  # noqa: E402
from tests.support.layouts import UNFUSED, Layout, all_layouts, fusions  # noqa: E402
from tests.support.parity import Case, Outcome, ParityBench  # noqa: E402
from tests.support.pool import RankFailed, WorkerPool  # noqa: E402
from tests.support.reference import Recipe, Reference  # noqa: E402

_TAKE_TURNS = ("recompute", "stages", "overlap")
"""Fields of a layout that are not crossed by default."""
_PATIENT = ("--distributed-timeout-minutes", "5")
"""Eight ranks on two cores can let each other wait for longer than tests allow."""
_HEADING = (
    "layout",
    "ranks",
    "loss, 20 steps",
    "gradient",
    "logits by PEFT",
    "loss, dropout 0.1",
    "--lora-fusion",
    "loss, fused",
    "gradient, fused",
    "replicas",
    "exact",
    "s",
)


@dataclass(frozen=True)
class Row:
    """What one layout gave."""

    layout: Layout
    loss: float = float("nan")
    """Largest relative difference over the steps."""
    gradient: float = float("nan")
    """Largest over all factors, norm of the difference over the norm."""
    logits: float = float("nan")
    """Largest absolute difference between ours after training and those of PEFT with the saved adapter."""
    dropped_loss: float = float("nan")
    fusion: str = ""
    """Which schedule the fused run had."""
    fused_loss: float = float("nan")
    fused_gradient: float = float("nan")
    replicas: str = "differ"
    seconds: float = 0.0
    problem: str = ""

    @property
    def exact(self) -> bool:
        """Whether every figure is within the tolerance of the tests."""
        return (
            not self.problem
            and all(loss <= LOSS for loss in (self.loss, self.dropped_loss, self.fused_loss))
            and all(gradient <= GRADIENT for gradient in (self.gradient, self.fused_gradient))
            and self.logits <= LOGITS
        )

    @property
    def cells(self) -> list[str]:
        """Of the table."""
        figures = [f"{value:.1e}" for value in (self.loss, self.gradient, self.logits, self.dropped_loss)]
        fused = [self.fusion, f"{self.fused_loss:.1e}", f"{self.fused_gradient:.1e}"]
        verdict = "yes" if self.exact else f"NO {self.problem}".strip()
        return [
            str(self.layout),
            str(self.layout.world_size),
            *figures,
            *fused,
            self.replicas,
            verdict,
            f"{self.seconds:.0f}",
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; the exit status."""
    options = _parser().parse_args(arguments)
    layouts = choose(options.ranks, options.all, options.only)
    if not layouts:
        print(f"error: --only {options.only}: no layout has that in its name", file=sys.stderr)
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    disable_progress_bar()
    torch.set_num_threads(1)
    workers = WorkerPool(timeout=600.0)
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="parity_matrix_") as folder:
            bench = ParityBench(Path(folder), workers)
            rows = []
            for turn, layout in enumerate(layouts):
                rows.append(measure(bench, layout, turn))
                print(" | ".join(rows[-1].cells), flush=True)
    finally:
        workers.close()
    text = report(rows, time.monotonic() - started)
    print(text)
    if options.output is not None:
        with atomic_file(options.output) as temporary:
            Path(temporary).write_text(text + "\n", encoding="utf-8")
    return 0 if all(row.exact for row in rows) else 1


def choose(ranks: Sequence[int], every_variation: bool, only: str | None) -> list[Layout]:
    """The layouts of these numbers of ranks, by number of ranks."""
    found = [layout for layout in all_layouts(max(ranks), [UNFUSED]) if layout.world_size in ranks]
    if not every_variation:
        found = _one_of_each(found)
    found = [layout for layout in found if only is None or only in str(layout)]
    return sorted(found, key=lambda layout: layout.world_size)


def _one_of_each(layouts: Sequence[Layout]) -> list[Layout]:
    """One layout of every combination of degrees; the fields that are not crossed take turns."""
    by_degrees: dict[tuple[object, ...], list[Layout]] = defaultdict(list)
    for layout in layouts:
        degrees = tuple(value for name, value in vars(layout).items() if name not in _TAKE_TURNS)
        by_degrees[degrees].append(layout)
    # A step that has no factor in common with the number of variations meets all of them in turn.
    return [several[7 * turn % len(several)] for turn, several in enumerate(by_degrees.values())]


def measure(bench: ParityBench, layout: Layout, turn: int) -> Row:
    """One layout: trained three times, compared, saved and loaded by PEFT."""
    started = time.monotonic()
    save = bench.new_folder()
    schedules = [name for name in fusions(layout.tp) if name != UNFUSED]
    fused = replace(layout, fusion=schedules[turn % len(schedules)])
    case, dropped_case = (
        Case(recipe=Recipe(global_batch_size=rows_of_a_step(layout), dropout=p)) for p in (0.0, 0.1)
    )
    try:
        outcome = bench.train(case, layout, [*_PATIENT, "--save", str(save)])
        found = bench.compare(case, outcome)
        dropped = bench.compare(dropped_case, bench.train(dropped_case, layout, _PATIENT))
        by_fusion = bench.compare(case, bench.train(case, fused, _PATIENT))
        logits = _difference_by_peft(bench, case, outcome, save)
    except (AssertionError, RankFailed) as error:
        problem = str(error).strip().splitlines()[-1][:120]
        return Row(layout, problem=problem, seconds=time.monotonic() - started)
    return Row(
        layout,
        loss=found.loss,
        gradient=found.gradient,
        logits=logits,
        dropped_loss=dropped.loss,
        fusion=fused.fusion,
        fused_loss=by_fusion.loss,
        fused_gradient=by_fusion.gradient,
        replicas="bit-equal",
        seconds=time.monotonic() - started,
    )


def rows_of_a_step(layout: Layout) -> int:
    """Four, or as many as give interleaved stages a micro-batch for each pipeline rank."""
    return max(4, layout.dp * layout.pp) if layout.vpp > 1 else 4


def _difference_by_peft(bench: ParityBench, case: Case, outcome: Outcome, save: Path) -> float:
    """Between our logits after training and those of PEFT with the adapter that was saved."""
    reference = Reference(bench.model(case.model))
    reference.load_adapter(save / "adapter")
    theirs = [reference.logits(row) for row in bench.probe_rows]
    ours = [outcome.logits("end")[: len(row), number] for number, row in enumerate(bench.probe_rows)]
    return largest_logit_difference(ours, theirs)


def report(rows: Sequence[Row], seconds: float) -> str:
    """The document: what was measured where, and the table."""
    where = machine()
    facts = commit()
    sha = facts.get("sha", "unknown")[:12] + (" and changes" if facts.get("changed") else "")
    good = sum(row.exact for row in rows)
    return "\n".join(
        [
            "# Layouts against transformers + PEFT",
            "",
            f"{good} of {len(rows)} layouts are exact. Made by `python tools/parity_matrix.py`, commit {sha}, "
            f"{seconds / 60:.0f} min on {where['cpu']}, {where['cores']} cores.",
            ", ".join(f"{name} {number}" for name, number in versions().items()) + ".",
            "",
            "A small Llama (4 layers, grouped queries) is trained for 20 steps in float32 with LoRA on all four",
            f"linears. Exact means: every step's loss within {LOSS:g} of PEFT's (relative), without and with dropout",
            f"0.1, and with --lora-fusion; every factor's gradient within {GRADIENT:g} (norm of the difference by the",
            f"norm); PEFT loads the saved adapter and gives our logits within {LOGITS:g}; every factor that several",
            "ranks hold is the same to the bit. What these allow for is told in `tests/support/differences.py`.",
            "",
            "tp: tensor parallel, sp: with sequence parallelism; pp: pipeline stages, ×: chunks of each; cp: context "
            "parallel; dp: data parallel, zero1: distributed optimizer; then stage sizes, overlap, recomputation. "
            "--lora-fusion: which schedule the fused run had, as `tests/support/layouts.py` names them.",
            "",
            table(_HEADING, [row.cells for row in rows]),
        ]
    )


def _parser() -> argparse.ArgumentParser:
    description, _, _ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add(
        "--ranks",
        type=int,
        nargs="+",
        choices=range(1, 9),
        default=[1, 2, 4],
        metavar="N",
        help="numbers of ranks",
    )
    add("--all", action="store_true", help="cross recomputation, stage sizes and overlap too")
    add("--only", metavar="TEXT", help="only layouts whose name has this")
    add("--output", type=Path, metavar="FILE.md", help="also write the table to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
