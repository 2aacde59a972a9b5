"""Speed of preparing data, beside the bare tokenizer on the same text in the same run.

    python benchmarks/preprocess.py --json benchmarks/results/preprocess.json

The rows are the demo rows again and again, each with a number of its own, so that none is like another. For plain
text, for conversations by the template chatml and by the tokenizer's own chat template (``template``), and for each
number of threads n, one process prepares all rows with n workers and then gives the very texts that it prepared to
``encode_batch`` of the tokenizers library with n threads.
Rates are tokens a second of what each wrote or returned; starting, importing and loading the tokenizer are left out
on both sides, reading, labelling and writing count for ours.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison.assets import assets
from comparison.machine import commit, machine, versions
from comparison.process import ROOT
from comparison.table import table
from comparison.tokenised import KINDS, Request, write_rows

from mindspeed_lora.errors import Failed

BAR_OF_RAW = 0.8
BAR_OF_WORKERS = 1.6
"""Two workers beside one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rows", type=int, default=30_000, help="rows of each kind (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=1, help="times that everything is done (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers and threads (default: 1 2)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to this file")
    options = parser.parse_args(words)
    found = assets()
    circumstances = {
        "command": shlex.join(["python", "benchmarks/preprocess.py", *words]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="preprocess-") as folder:
        write_rows(Path(found["DATA"]) / "alpaca_en_demo.json", Path(folder), options.rows)
        for _ in range(options.repeats):
            for kind in KINDS:
                for workers in options.workers:
                    measured.append(_measure(Request(kind, workers, folder, found["MODEL"])))
    result = {"benchmark": "preprocess", **circumstances, "rows": options.rows, "runs": summarised(measured)}
    print(text(result))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _measure(request: Request) -> dict[str, Any]:
    """One process that prepares and encodes."""
    child = Path(__file__).parent / "comparison" / "tokenised.py"
    done = subprocess.run(
        [sys.executable, str(child), *request.words],
        env=request.environment,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    if done.returncode != 0:
        raise Failed(
            f"preparing {request.kind} rows with {request.workers} workers ended with {done.returncode}"
        )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"kind": request.kind, "workers": request.workers, **answer}


def summarised(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The median rates of each kind and number of workers, and their ratios."""
    runs: list[dict[str, Any]] = []
    for kind, workers in dict.fromkeys((run["kind"], run["workers"]) for run in measured):
        same = [run for run in measured if (run["kind"], run["workers"]) == (kind, workers)]
        ours, raw = (statistics.median(run["tokens"] / run[side] for run in same) for side in ("ours", "raw"))
        first = next((run for run in runs if run["kind"] == kind), None)
        runs.append(
            {
                "kind": kind,
                "workers": workers,
                "tokens": same[0]["tokens"],
                "ours_tokens_per_second": ours,
                "raw_tokens_per_second": raw,
                "of_raw": ours / raw,
                "of_first": 1.0 if first is None else ours / first["ours_tokens_per_second"],
            }
        )
    return runs


def text(result: dict[str, Any]) -> str:
    """The rates as a table, and the bars."""
    rows = [
        [
            run["kind"],
            str(run["workers"]),
            f"{run['ours_tokens_per_second'] / 1e3:,.0f}",
            f"{run['raw_tokens_per_second'] / 1e3:,.0f}",
            f"{run['of_raw']:.2f}",
            f"{run['of_first']:.2f}",
        ]
        for run in result["runs"]
    ]
    heading = [
        "rows",
        "workers",
        "ours, 1000 tokens/s",
        "encode_batch",
        "ours by encode_batch",
        "by one worker",
    ]
    bars = (
        f"Bars: {BAR_OF_RAW} of encode_batch at as many threads, {BAR_OF_WORKERS} times one worker with two."
    )
    return f"{table(heading, rows)}\n\n{bars}"


if __name__ == "__main__":
    sys.exit(main())
