"""One process with two threads against two tensor-parallel ranks with one thread each, alternately.

    python benchmarks/tensor_parallel.py --json benchmarks/results/tensor_parallel.json

Both train the head-padded SmolLM2-135M (12 query heads, so that two ranks share them) on the same packed rows, from
the same adapter; the ranks share norms and residuals too (``--sequence-parallel``). The ratio says what is left of
the machine when its cores have to talk to each other.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comparison.assets import assets
from comparison.inputs import make_inputs
from comparison.process import run_child
from comparison.report import Facts
from comparison.setting import Inputs, Setting
from comparison.sides import SideRun, checked, ours_flags, steps_of
from comparison.summary import LOSS_TOLERANCE, Spread
from comparison.table import table

from mindspeed_lora.errors import Failed, UserError


@dataclass(frozen=True)
class Ranks:
    """``posttrain_gpt.py`` on so many tensor-parallel ranks, the threads shared among them."""

    count: int
    rows_at_once: int | None = None
    same_rows: bool = True

    @property
    def name(self) -> str:
        """Heading of its column."""
        return "one process" if self.count == 1 else f"{self.count} TP ranks"

    def run(self, setting: Setting, inputs: Inputs, folder: Path) -> SideRun:
        """Train once."""
        save = folder / "run"
        command = ["posttrain_gpt.py", *ours_flags(setting, inputs, self.rows_at_once), "--save", str(save)]
        if self.count > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.count)]
            layout = ["--tensor-model-parallel-size", str(self.count), "--sequence-parallel", "--lora-fusion"]
            command = [*launcher, *command, *layout]
        ended = run_child(command, setting.threads // self.count, folder / "log")
        return checked(self, setting, inputs, steps_of(save), ended)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    found = assets()
    setting = Setting(
        model=options.model or found["PADDED_MODEL"],
        data=options.data or f"{found['DATA']}/alpaca_en_demo.json",
        warmup=options.warmup,
        steps=options.steps,
    )
    facts = Facts.now(setting, shlex.join(["python", "benchmarks/tensor_parallel.py", *words]))
    sides = [Ranks(1), Ranks(2)]
    try:
        runs = _alternate(setting, sides, options.repeats)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    speeds = [_speed(setting, runs[side.name]) for side in sides]
    ratio = speeds[1].median / speeds[0].median
    losses = [runs[side.name][0].steps[0].loss for side in sides]
    agree = abs(losses[0] - losses[1]) <= LOSS_TOLERANCE
    print(_text(sides, speeds, runs, ratio))
    if not agree:
        print(f"WARNING: first losses differ: {losses[0]:.6f}, {losses[1]:.6f}", file=sys.stderr)
    if options.json is not None:
        content = {
            "benchmark": "tensor_parallel",
            **facts.to_json(),
            "sides": [
                {
                    "name": side.name,
                    "tokens_per_second": vars(speed),
                    "peak_memory_bytes": max(run.peak_memory_bytes for run in runs[side.name]),
                }
                for side, speed in zip(sides, speeds, strict=True)
            ],
            "ratio": ratio,
            "first_losses_agree": agree,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if agree else Failed.exit_status


def _alternate(setting: Setting, sides: Sequence[Ranks], repeats: int) -> dict[str, list[SideRun]]:
    runs: dict[str, list[SideRun]] = {side.name: [] for side in sides}
    with tempfile.TemporaryDirectory(prefix="tensor_parallel-") as made:
        folder = Path(made)
        inputs = make_inputs(setting, folder)
        for repeat in range(repeats):
            for side in sides:
                own = folder / f"{side.count}-{repeat}"
                own.mkdir()
                runs[side.name].append(side.run(setting, inputs, own))
    return runs


def _speed(setting: Setting, runs: Sequence[SideRun]) -> Spread:
    measured = [step for run in runs for step in run.steps[setting.warmup :]]
    return Spread.of([step.tokens / step.elapsed_ms * 1000 for step in measured])


def _text(
    sides: Sequence[Ranks], speeds: Sequence[Spread], runs: dict[str, list[SideRun]], ratio: float
) -> str:
    rows = [
        ["real tokens/s", *(f"{s.median:.0f} ({s.lowest:.0f}–{s.highest:.0f})" for s in speeds)],
        ["first loss", *(f"{runs[side.name][0].steps[0].loss:.6f}" for side in sides)],
    ]
    names = ["", *(side.name for side in sides)]
    return f"{table(names, rows)}\n\n{sides[1].name} reach {ratio:.2f} of {sides[0].name}"


def _parser() -> argparse.ArgumentParser:
    description, _, _ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--model", help="Hugging Face folder whose heads two ranks can share (default: padded SmolLM2-135M)")
    add("--data", help="JSON or JSONL instruction rows (default: the demo rows, fetched)")
    add("--steps", type=int, default=8, help="measured steps of a repetition (default: %(default)s)")
    add("--warmup", type=int, default=2, help="steps before them (default: %(default)s)")
    add("--repeats", type=int, default=2, help="repetitions of each side (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write everything to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
