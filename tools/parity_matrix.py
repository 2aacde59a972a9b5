"""Every kind of parallel layout against transformers + PEFT: one table, and exit status 1 where one is not exact.

    python tools/parity_matrix.py --ranks 1 2 4                the layouts of 1, 2 and 4 ranks
    python tools/parity_matrix.py --ranks 1 2 4 8 --output docs/parity.md
    python tools/parity_matrix.py --ranks 1 2 4 --rows experts --output docs/parity_experts.md
    python tools/parity_matrix.py --ranks 2 --only tp2 --all   those whose name has tp2, in every variation

A small Llama is trained for 20 steps over real process groups (gloo), from one PEFT adapter, on the same rows as
its reference, which is one process of transformers + PEFT in float32: without dropout, with dropout of the adapter's
input, where PEFT gets our masks, and with --lora-fusion. Degrees are crossed; recomputation, stage sizes and overlap
take turns unless ``--all`` crosses them too, and so do the schedules of --lora-fusion. Models with experts are cut in
further ways: ``parity_experts.py``.
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
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import parity_experts  # noqa: E402
import torch  # noqa: E402
from comparison.machine import commit, machine, versions  # noqa: E402
from comparison.table import table  # noqa: E402
from parity_row import FAILURES, PATIENT, Row, difference_by_peft, figure, rows_of_a_step, sentence  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from mindspeed_lora.atomic import atomic_file  # noqa: E402
from tests.support.differences import GRADIENT, LOGITS, LOSS  # noqa: E402
from tests.support.layouts import UNFUSED, Layout, all_layouts, fusions  # noqa: E402
from tests.support.parity import Case, ParityBench  # noqa: E402
from tests.support.pool import WorkerPool  # noqa: E402
from tests.support.reference import Recipe  # noqa: E402

AnyRow = TypeVar("AnyRow", bound=Row)
_TAKE_TURNS = ("recompute", "stages", "overlap")
"""Fields of a layout that are not crossed by default."""


@dataclass(frozen=True, kw_only=True)
class DenseRow(Row):
    """What one layout of a model without experts gave."""

    dropped_loss: float = figure("loss, dropout 0.1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; the exit status."""
    options = _parser().parse_args(arguments)
    dense = choose(options.ranks, options.all, options.only) if "dense" in options.rows else []
    mixtures = parity_experts.choose(options.ranks, options.only) if "experts" in options.rows else []
    if not dense and not mixtures:
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
            rows = [_shown(measure(bench, layout, turn)) for turn, layout in enumerate(dense)]
            experts = [_shown(parity_experts.measure(bench, job, turn)) for turn, job in enumerate(mixtures)]
    finally:
        workers.close()
    text = report(rows, experts, time.monotonic() - started)
    print(text)
    if options.output is not None:
        with atomic_file(options.output) as temporary:
            Path(temporary).write_text(text + "\n", encoding="utf-8")
    return 0 if all(row.exact for row in (*rows, *experts)) else 1


def _shown(row: AnyRow) -> AnyRow:
    print(" | ".join(row.cells), flush=True)
    return row


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


def measure(bench: ParityBench, layout: Layout, turn: int) -> DenseRow:
    """One layout: trained three times, compared, saved and loaded by PEFT."""
    started = time.monotonic()
    save = bench.new_folder()
    schedules = [name for name in fusions(layout.tp) if name != UNFUSED]
    fused = replace(layout, fusion=schedules[turn % len(schedules)])
    case, dropped_case = (
        Case(recipe=Recipe(steps=20, global_batch_size=rows_of_a_step(layout), dropout=p)) for p in (0.0, 0.1)
    )
    name, ranks = str(layout), layout.world_size
    try:
        outcome = bench.train(case, layout, [*PATIENT, "--save", str(save)])
        found = bench.compare(case, outcome)
        dropped = bench.compare(dropped_case, bench.train(dropped_case, layout, PATIENT))
        by_fusion = bench.compare(case, bench.train(case, fused, PATIENT))
        logits = difference_by_peft(bench, case, outcome, save)
    except FAILURES as error:
        return DenseRow(name=name, ranks=ranks, problem=sentence(error), seconds=time.monotonic() - started)
    return DenseRow(
        name=name,
        ranks=ranks,
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


def report(rows: Sequence[DenseRow], experts: Sequence[parity_experts.ExpertRow], seconds: float) -> str:
    """The document: what was measured where, and a table of each kind of rows."""
    where = machine()
    facts = commit()
    sha = facts.get("sha", "unknown")[:12] + (" and changes" if facts.get("changed") else "")
    every = [*rows, *experts]
    good = sum(row.exact for row in every)
    dense = ["", table(DenseRow.heading(), [row.cells for row in rows])] if rows else []
    mixtures = [
        "",
        *parity_experts.text(),
        "",
        table(parity_experts.ExpertRow.heading(), [row.cells for row in experts]),
    ]
    return "\n".join(
        [
            "# Layouts against transformers + PEFT",
            "",
            f"{good} of {len(every)} layouts are exact. Made by `python tools/parity_matrix.py`, commit {sha}, "
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
            *dense,
            *(mixtures if experts else []),
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
    add(
        "--rows",
        nargs="+",
        choices=("dense", "experts"),
        default=["dense", "experts"],
        help="which kinds of models",
    )
    add("--all", action="store_true", help="dense: cross recomputation, stage sizes and overlap too")
    add("--only", metavar="TEXT", help="only layouts whose name has this")
    add("--output", type=Path, metavar="FILE.md", help="also write the table to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
