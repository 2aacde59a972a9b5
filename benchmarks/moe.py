"""Training a mixture of experts: ours, TRL (SFTTrainer) with PEFT, and our own dense model of the same active size.

    python benchmarks/moe.py --json benchmarks/results/moe.json     the whole comparison
    python benchmarks/moe.py --steps 2 --repeats 1 --sides ours:packed dense:packed trl:8+kept    a quick one

The model is SmolLM2 up-cycled to 4 experts, of which a token takes 2; the adapter is on all linears and on every
expert. Each repetition of a side is a process of its own, and sides take turns, as in train_vs_trl.py. Exit status 1
where first losses differ: then the sides did not compute the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison.experts import BARS, Dense, Job, is_reached, make_jobs, reached, told
from comparison.report import Facts, Outcome
from comparison.sides import Side, side_of
from comparison.summary import Summary, summarise
from comparison.table import table
from train_vs_trl import alternate, setting_of

from mindspeed_lora.errors import Failed, Refused, UserError

_SIDES = (
    "ours:packed",
    "dense:packed",
    "trl:8",
    "trl:packed",
    "trl:packed+eager",
    "trl:packed+kept",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    folder = Path(tempfile.mkdtemp(prefix="moe-"))
    try:
        return _measure(options, words, folder)
    except UserError as error:
        if isinstance(error, Failed):
            kept = Path(tempfile.mkdtemp(prefix="moe-logs-"))
            for log in folder.rglob("*log"):
                shutil.copy(log, kept / str(log.relative_to(folder)).replace("/", "_"))
            print(f"all logs are in {kept}", file=sys.stderr)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(options: argparse.Namespace, words: Sequence[str], folder: Path) -> int:
    setting = setting_of(options)
    _check_sides(options.sides)
    facts = Facts.now(setting, shlex.join(["python", "benchmarks/moe.py", *words]))
    mixture, dense = make_jobs(setting, options.experts, options.topk, folder)
    sides = [_side(word, dense) for word in options.sides]
    runs = alternate(mixture.setting, mixture.inputs, sides, options.repeats, folder)
    summaries = [
        summarise(mixture.setting, mixture.inputs, side, runs[side.name]) for side in sides if runs[side.name]
    ]
    outcome = Outcome(facts=facts, repeats=options.repeats, summaries=summaries, runs=runs, profile=None)
    rates = _rates(summaries, sides, mixture, dense)
    found = reached(summaries, mixture, dense)
    print(outcome.text(), table(["", "GFLOP/s of the model"], _rows(rates)), told(found), sep="\n\n")
    for sentence in outcome.disagreements:
        print(f"WARNING: {sentence}", file=sys.stderr)
    if options.json is not None:
        outcome.write(options.json)
        _add(options.json, options, rates, found)
    return Failed.exit_status if outcome.disagreements else 0


def _rates(summaries: Sequence[Summary], sides: Sequence[Side], mixture: Job, dense: Job) -> dict[str, float]:
    of_dense = {side.name for side in sides if isinstance(side, Dense)}
    return {
        summary.name: (dense if summary.name in of_dense else mixture).gflop_per_second(summary)
        for summary in summaries
    }


def _rows(rates: Mapping[str, float]) -> list[list[str]]:
    return [[name, f"{rate:.1f}"] for name, rate in rates.items()]


def _add(
    path: Path, options: argparse.Namespace, rates: Mapping[str, float], found: Mapping[str, float]
) -> None:
    """What is told of experts alone, into the file."""
    content: dict[str, Any] = json.loads(path.read_text())
    content |= {
        "benchmark": "moe",
        "experts": {"num_experts": options.experts, "topk": options.topk},
        "gflop_per_second": rates,
        "figures": {
            name: {"value": value, "bar": BARS.get(name), "reached": is_reached(name, value)}
            for name, value in found.items()
        },
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _side(word: str, dense: Job) -> Side:
    return Dense(dense) if word == "dense:packed" else side_of(word)


def _check_sides(words: Sequence[str]) -> None:
    """Before anything is made."""
    if not words[0].startswith("ours:"):
        raise Refused(f"--sides: the first is {words[0]}; begin with ours:packed, which all ratios are of")
    for word in words:
        if word != "dense:packed":
            side_of(word)
    missing = [name for name in ("trl", "peft", "datasets") if importlib.util.find_spec(name) is None]
    if missing and any(word.startswith("trl:") for word in words):
        raise Refused(
            f"{' and '.join(missing)} cannot be imported; make bench installs what is compared with, "
            "--sides ours:packed dense:packed does without"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--model", help="Hugging Face folder of a Llama (default: SmolLM2-135M-Instruct, fetched)")
    add("--data", help="JSON or JSONL instruction rows (default: the demo rows, fetched)")
    add("--rows", type=int, help="use only the first rows of the file (default: all)")
    add("--experts", type=int, default=4, help="of a layer (default: %(default)s)")
    add("--topk", type=int, default=2, help="experts of a token (default: %(default)s)")
    add("--steps", type=int, default=4, help="measured steps of a repetition (default: %(default)s)")
    add("--warmup", type=int, default=1, help="steps before them (default: %(default)s)")
    add("--repeats", type=int, default=2, help="repetitions of each side (default: %(default)s)")
    add("--threads", type=int, default=2, help="threads of each process (default: %(default)s)")
    add(
        "--sides",
        nargs="+",
        default=_SIDES,
        metavar="SIDE",
        help="ours:ROWS first, then dense:packed and trl:ROWS, ROWS being 1, 2, 4, 8 or packed; for TRL +kept to keep "
        "freed memory as ours does, and +eager, +grouped_mm or +batched_mm, how transformers computes experts "
        "(default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="also write everything to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
