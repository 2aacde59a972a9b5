"""LoRA training speed and memory: ours and TRL (SFTTrainer) with PEFT, alternately in one run.

    python benchmarks/train_vs_trl.py                        the whole comparison, on SmolLM2-135M
    python benchmarks/train_vs_trl.py --steps 3 --repeats 1 --sides ours:packed trl:8   a quick one
    python benchmarks/train_vs_trl.py --profile              and where a step of ours goes

Each repetition of a side is a process of its own. Both train the same weights on the same tokens in file
order, from the same adapter, with the same numbers; README.md beside this file tells what is held equal.
Exit status 1 where the first losses differ: then the sides did not compute the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from comparison.assets import assets
from comparison.inputs import make_inputs
from comparison.profiling import profile_ours
from comparison.report import Facts, Outcome
from comparison.setting import Inputs, Setting
from comparison.sides import Ours, Side, SideRun, side_of
from comparison.summary import summarise

from mindspeed_lora.errors import Failed, Refused, UserError

_SIDES = ("ours:packed", "trl:8", "trl:4", "trl:2", "trl:1", "trl:packed", "trl:8+kept", "trl:1+kept")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    try:
        outcome = _in_own_folder(options, words)
    except UserError as error:
        _say(f"error: {error}")
        return error.exit_status
    print(outcome.text(), flush=True)
    for sentence in outcome.disagreements:
        _say(f"WARNING: {sentence}")
    if options.json is not None:
        outcome.write(options.json)
        _say(f"written: {options.json}")
    return Failed.exit_status if outcome.disagreements else 0


def _in_own_folder(options: argparse.Namespace, words: Sequence[str]) -> Outcome:
    """Measure in a temporary folder, which stays where a process failed: its message names the log there."""
    folder = Path(tempfile.mkdtemp(prefix="train_vs_trl-"))
    kept = False
    try:
        return _measure(options, words, folder)
    except Failed:
        kept = True
        raise
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def _measure(options: argparse.Namespace, words: Sequence[str], folder: Path) -> Outcome:
    """Everything that takes time; each process writes into ``folder``."""
    sides = _sides(options)
    if not options.repeats and not options.profile:
        raise Refused("--repeats 0 measures nothing; give at least 1, or --profile")
    setting = setting_of(options)
    facts = Facts.now(setting, shlex.join(["python", "benchmarks/train_vs_trl.py", *words]))
    if facts.busy:
        _say(
            f"notice: load average {facts.machine['load_average']}: other work runs here, figures will be noisy"
        )
    inputs = make_inputs(setting, folder)
    runs = alternate(setting, inputs, sides, options.repeats, folder)
    profile = None
    if options.profile:
        _say("profiling ours")
        rows = next((side.rows_at_once for side in sides if isinstance(side, Ours)), None)
        profile = profile_ours(setting, inputs, rows, _new(folder / "profile"))
    return Outcome(
        facts=facts,
        repeats=options.repeats,
        summaries=[summarise(setting, inputs, side, runs[side.name]) for side in sides if runs[side.name]],
        runs=runs,
        profile=profile,
    )


def alternate(
    setting: Setting, inputs: Inputs, sides: Sequence[Side], repeats: int, folder: Path
) -> dict[str, list[SideRun]]:
    """Every side once, then every side again: what slows the machine for a while slows all of them."""
    runs: dict[str, list[SideRun]] = {side.name: [] for side in sides}
    for repeat in range(1, repeats + 1):
        for number, side in enumerate(sides):
            run = side.run(setting, inputs, _new(folder / f"run-{repeat}-{number}"))
            runs[side.name].append(run)
            measured = run.steps[setting.warmup :]
            seconds = sum(step.elapsed_ms for step in measured) / 1000
            _say(
                f"{side.name}, {repeat} of {repeats}: {sum(s.tokens for s in measured) / seconds:.0f} real tokens/s, "
                f"{run.peak_memory_bytes / 1e9:.2f} GB, {run.seconds:.0f} s in all"
            )
    return runs


def _sides(options: argparse.Namespace) -> list[Side]:
    sides = [side_of(word) for word in options.sides]
    missing = [name for name in ("trl", "peft", "datasets") if importlib.util.find_spec(name) is None]
    if missing and not all(isinstance(side, Ours) for side in sides):
        raise Refused(
            f"{' and '.join(missing)} cannot be imported; make bench installs what is compared with, "
            "--sides ours:packed does without"
        )
    return sides


def setting_of(options: argparse.Namespace) -> Setting:
    """What the options common to the comparisons say; model and rows are fetched where they say nothing."""
    model, data = options.model, options.data
    if model is None or data is None:
        found = assets()
        model = model or found["MODEL"]
        data = data or f"{found['DATA']}/alpaca_en_demo.json"
    if not (Path(model) / "config.json").is_file():
        raise Refused(f"--model {model}: there is no config.json; give a Hugging Face folder")
    return Setting(
        model=str(Path(model).resolve()),
        data=str(Path(data).resolve()),
        rows=options.rows,
        threads=options.threads,
        warmup=options.warmup,
        steps=options.steps,
    )


def _parser() -> argparse.ArgumentParser:
    description, _, _ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--model", help="Hugging Face folder (default: SmolLM2-135M-Instruct, fetched)")
    add("--data", help="JSON or JSONL instruction rows (default: the demo rows, fetched)")
    add("--rows", type=_positive, help="use only the first rows of the file (default: all)")
    add("--steps", type=_positive, default=10, help="measured steps of a repetition (default: %(default)s)")
    add("--warmup", type=_whole, default=2, help="steps before them (default: %(default)s)")
    add("--repeats", type=_whole, default=3, help="repetitions of each side (default: %(default)s)")
    add("--threads", type=_positive, default=2, help="threads of each process (default: %(default)s)")
    add(
        "--sides",
        nargs="+",
        default=_SIDES,
        metavar="SIDE",
        help="who takes part: ours:ROWS or trl:ROWS, ROWS at once being 1, 2, 4, 8 or packed, and for TRL +kept to "
        "keep freed memory as ours does; ratios are of the first to the others (default: %(default)s)",
    )
    add("--profile", action="store_true", help="also show where a step of ours goes")
    add("--json", type=Path, metavar="FILE", help="also write everything to this file")
    return parser


def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
