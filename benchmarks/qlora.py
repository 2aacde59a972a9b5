"""Training on a frozen 4-bit model: ours beside our own LoRA and beside TRL + bitsandbytes + PEFT.

    python benchmarks/qlora.py --json benchmarks/results/qlora.json      the whole comparison
    python benchmarks/qlora.py --steps 1 --warmup 0 --repeats 1 --sides ours:4+nf4 ours:4 --gigabytes 0.5   a quick one

Rows of 512 tokens, put together from the demo's, four at once. Frozen linears are in NF4 with nested statistics, the
same bits on both sides. Each repetition of a side is a process of its own, and sides take turns, as in train_vs_trl.py.
Then the time to load and quantise a made-up Llama beside that to read its file, both with a cold cache, and the bytes
of a rank: predicted and measured for SmolLM2, predicted for Llama-2-70B and Mixtral-8x7B. Exit status 1 where first
losses differ: then the sides did not compute the same.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

from comparison.inputs import make_inputs
from comparison.quantised import (
    BARS,
    PUBLISHED_GIB,
    is_reached,
    memory,
    memory_text,
    quantising,
    quantising_text,
    reached,
    told,
)
from comparison.report import Facts, Outcome
from comparison.sides import Ours, Side, Trl, side_of
from comparison.summary import summarise
from train_vs_trl import alternate, setting_of

from mindspeed_lora.errors import Failed, Refused, UserError

ROWS_AT_ONCE = 4
_SIDES = ("ours:4+nf4", "ours:4", "trl:4+nf4", "trl:4+nf4+kept")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    folder = Path(tempfile.mkdtemp(prefix="qlora-", dir=options.folder))
    kept = False
    try:
        return _measure(options, words, folder)
    except UserError as error:
        kept = isinstance(error, Failed)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def _measure(options: argparse.Namespace, words: Sequence[str], folder: Path) -> int:
    sides = _sides(options.sides)
    setting = replace(
        setting_of(options),
        seq_length=options.seq_length,
        global_batch_size=ROWS_AT_ONCE,
        packed_rows=ROWS_AT_ONCE,
    )
    facts = Facts.now(setting, shlex.join(["python", "benchmarks/qlora.py", *words]))
    inputs = make_inputs(setting, folder, full_rows=True)
    runs = alternate(setting, inputs, sides, options.repeats, folder)
    summaries = [summarise(setting, inputs, side, runs[side.name]) for side in sides if runs[side.name]]
    outcome = Outcome(facts=facts, repeats=options.repeats, summaries=summaries, runs=runs, profile=None)
    print(outcome.text(), flush=True)
    speed = quantising(setting, inputs, options.gigabytes, options.loads, folder) if options.loads else None
    if speed is not None:
        print(f"\n{quantising_text(speed)}", flush=True)
    bytes_of = memory(setting, inputs, summaries, folder)
    found = reached(summaries, speed, bytes_of)
    print(f"\nGB of one rank that holds the whole model:\n\n{memory_text(bytes_of)}\n\n{told(found)}")
    for sentence in outcome.disagreements:
        print(f"WARNING: {sentence}", file=sys.stderr)
    if options.json is not None:
        outcome.write(options.json)
        _add(options.json, speed, bytes_of, found)
    return Failed.exit_status if outcome.disagreements else 0


def _add(
    path: Path,
    speed: Mapping[str, Any] | None,
    bytes_of: Sequence[Mapping[str, Any]],
    found: Mapping[str, float],
) -> None:
    """What is told of quantised models alone, into the file."""
    content: dict[str, Any] = json.loads(path.read_text())
    content |= {
        "benchmark": "qlora",
        "quantising": speed,
        "memory": bytes_of,
        "published_gibibytes": PUBLISHED_GIB,
        "figures": {
            name: {"value": value, "bar": BARS[name], "reached": is_reached(name, value)}
            for name, value in found.items()
        },
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _sides(words: Sequence[str]) -> list[Side]:
    """Before anything is made; of ours without quantising, losses are others."""
    sides = [side_of(word) for word in words]
    first = sides[0]
    if not (isinstance(first, Ours) and first.quantised):
        raise Refused(f"--sides: the first is {words[0]}; begin with ours:4+nf4, which all ratios are of")
    for word, side in zip(words, sides, strict=True):
        if side.rows_at_once != ROWS_AT_ONCE:
            raise Refused(
                f"--sides {word}: this comparison takes {ROWS_AT_ONCE} rows at once; say :{ROWS_AT_ONCE}"
            )
    needed = ("trl", "peft", "datasets", "bitsandbytes")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing and any(isinstance(side, Trl) for side in sides):
        raise Refused(
            f"{' and '.join(missing)} cannot be imported; make bench installs what is compared with, "
            "--sides ours:4+nf4 ours:4 does without"
        )
    return [
        replace(side, same_rows=False) if isinstance(side, Ours) and not side.quantised else side
        for side in sides
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--model", help="Hugging Face folder of a Llama (default: SmolLM2-135M-Instruct, fetched)")
    add("--data", help="JSON or JSONL instruction rows (default: the demo rows, fetched)")
    add("--rows", type=int, help="use only the first rows of the file (default: all)")
    add("--seq-length", type=int, default=512, help="tokens of a row (default: %(default)s)")
    add("--steps", type=int, default=3, help="measured steps of a repetition (default: %(default)s)")
    add("--warmup", type=int, default=1, help="steps before them (default: %(default)s)")
    add("--repeats", type=int, default=2, help="repetitions of each side (default: %(default)s)")
    add("--threads", type=int, default=2, help="threads of each process (default: %(default)s)")
    add(
        "--gigabytes",
        type=float,
        default=2.5,
        help="size of the model that is quantised (default: %(default)s)",
    )
    add("--loads", type=int, default=2, help="times that it is read and loaded (default: %(default)s)")
    add("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    add(
        "--sides",
        nargs="+",
        default=_SIDES,
        metavar="SIDE",
        help="ours:4+nf4 first, then ours:4 and trl:4+nf4; for TRL +kept to keep freed memory as ours does "
        "(default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="also write everything to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
