"""Conversion beside a raw copy of the same bytes, transformers' load and save, and PEFT's merge.

    python benchmarks/convert.py --json benchmarks/results/convert.json

A made-up Llama in bf16 (the shape of Llama-3.2-3B) goes from Hugging Face's files to Megatron's at TP 2 x PP 2 and
back, and gets a rank-16 adapter merged in. Every operation is one command in a process of its own, its whole time
counted; a copy of the same files, in blocks of 16 MiB and flushed to disk, comes right before each. Peak memory is
``ru_maxrss``; what the imports alone take is told beside it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from comparison.convert_child import SHAPE
from comparison.machine import commit, machine, versions
from comparison.process import run_child
from comparison.table import table

from mindspeed_lora.errors import UserError

CHILD = str(Path(__file__).resolve().parent / "comparison" / "convert_child.py")
CONVERT = "convert_ckpt.py"
LARGEST_TENSOR_BYTES = 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"]
IMPORTS = "import torch, mindspeed_lora.checkpoint.conversion.convert"


@dataclass(frozen=True)
class Operation:
    """One command, and the folder whose bytes it reads."""

    name: str
    reads: str
    command: tuple[str, ...]
    peer: bool = False


def operations(workers: int) -> list[Operation]:
    """What is measured; words that begin with ``@`` are folders within the benchmark's own."""

    def convert(*words: str) -> tuple[str, ...]:
        return (CONVERT, *words, "--workers", str(workers))

    layout = ("--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2")
    return [
        Operation(
            "hf -> mg TP2 x PP2",
            "base",
            convert("--load-dir", "@base", "--save-dir", "@mg", "--save-model-type", "mg", *layout),
        ),
        Operation(
            "mg TP2 x PP2 -> hf",
            "mg",
            convert("--load-dir", "@mg", "--save-dir", "@out", "--save-model-type", "hf"),
        ),
        Operation(
            "merge hf + adapter -> hf",
            "base",
            convert(
                *("--load-dir", "@base", "--lora-load", "@adapter"),
                *("--save-dir", "@out", "--save-model-type", "hf"),
            ),
        ),
        Operation("transformers load + save", "base", (CHILD, "transformers", "@base", "@out"), peer=True),
        Operation("PEFT merge + save", "base", (CHILD, "peft", "@base", "@adapter", "@out"), peer=True),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    result = {
        "benchmark": "convert",
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/convert.py", *words]),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }
    try:
        with tempfile.TemporaryDirectory(prefix="convert-", dir=options.folder) as made:
            result.update(_measure(Path(made), options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(text(result))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _measure(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    log = folder / "log"
    run_child([CHILD, "make", str(folder), str(options.gigabytes)], options.threads, log)
    imports = run_child(["-c", IMPORTS], options.threads, log).peak_memory_bytes
    rows = []
    for operation in operations(options.workers):
        if operation.peer and options.no_peers:
            continue
        runs = [_once(folder, operation, options, log) for _ in range(options.repeats)]
        size = _size(folder / operation.reads)
        rows.append(
            {
                "name": operation.name,
                "peer": operation.peer,
                "bytes": size,
                "seconds": [run[0] for run in runs],
                "copy_seconds": [run[1] for run in runs],
                "peak_memory_bytes": max(run[2] for run in runs),
                "share_of_copy": statistics.median(copy / own for own, copy, _ in runs),
            }
        )
        shutil.rmtree(folder / "out", ignore_errors=True)
    return {
        "gigabytes": _size(folder / "base") / 1e9,
        "workers": options.workers,
        "threads": options.threads,
        "cache": "cold" if options.cold else "warm",
        "imports_memory_bytes": imports,
        "largest_tensor_bytes": LARGEST_TENSOR_BYTES,
        "operations": rows,
    }


def _once(
    folder: Path, operation: Operation, options: argparse.Namespace, log: Path
) -> tuple[float, float, int]:
    """Seconds of the operation, seconds of the copy before it, and the operation's peak memory."""
    words = [str(folder / word[1:]) if word.startswith("@") else word for word in operation.command]
    read = folder / operation.reads
    seconds = []
    for command in ([CHILD, "copy", str(read), str(folder / "copy")], words):
        for written in ("copy", "out", "mg"):
            if written != operation.reads:
                shutil.rmtree(folder / written, ignore_errors=True)
        # Otherwise what is read is in the cache: the copy has just been there.
        if options.cold:
            run_child([CHILD, "forget", str(read)], options.threads, log)
        ended = run_child(command, options.threads, log)
        seconds.append(ended.seconds)
    shutil.rmtree(folder / "copy", ignore_errors=True)
    return seconds[1], seconds[0], ended.peak_memory_bytes


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def text(result: dict[str, Any]) -> str:
    """The result as a table."""
    rows = []
    for one in result["operations"]:
        seconds = statistics.median(one["seconds"])
        above = one["peak_memory_bytes"] - result["imports_memory_bytes"]
        rows.append(
            [
                one["name"],
                f"{seconds:.1f}",
                f"{one['bytes'] / seconds / 1e9:.2f}",
                f"{one['share_of_copy']:.2f}",
                f"{one['peak_memory_bytes'] / 1e9:.2f}",
                f"{above / 1e9:.2f}",
            ]
        )
    bound = 2 * result["largest_tensor_bytes"] * result["workers"] + 300e6
    heading = ["operation", "seconds", "GB/s", "share of a raw copy's rate", "peak GB", "above the imports"]
    return (
        f"{table(heading, rows)}\n\n{result['gigabytes']:.2f} GB in bf16, {result['workers']} workers, "
        f"{result['cache']} cache; the bound on memory above the imports is {bound / 1e9:.2f} GB "
        "(2 x largest tensor x workers + 300 MB)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--gigabytes", type=float, default=6.0, help="size of the made-up model (default: %(default)s)")
    add("--workers", type=int, default=2, help="the converter's (default: %(default)s)")
    add("--threads", type=int, default=2, help="threads of each process (default: %(default)s)")
    add("--repeats", type=int, default=2, help="runs of each operation (default: %(default)s)")
    add("--cold", action="store_true", help="drop what is read from the page cache before each run")
    add("--no-peers", action="store_true", help="without transformers and PEFT")
    add("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    add("--json", type=Path, metavar="FILE", help="also write everything to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
