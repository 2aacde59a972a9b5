"""--lora-fusion over a slow link: two tensor-parallel ranks whose loopback lets only so many bytes a second pass.

    python benchmarks/cclora.py --json benchmarks/results/cclora.json

Layers of Llama-2-7B's proportions under TP 2 with sequence parallelism, forward and backward, and the sum of partial
gradients as if every micro-batch were a step. Link rates are chosen such that the base's own collectives alone take
0.25, 0.5, 1 and 2 times the compute alone, which is the unfused step with its collectives replaced by local copies.
Every way runs by turns with the others. Hidden is ``1 − (step − compute) / communication``; the bound is the longer
one of the two.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison.machine import commit, machine, versions
from comparison.process import ROOT, run_child
from comparison.rate_limited_link import NAMESPACE, why_not
from comparison.sizes import Sizes
from comparison.table import table

from mindspeed_lora.errors import UserError

_RATIOS = (0.25, 0.5, 1.0, 2.0, None)
"""Communication to compute; None: the link as it is."""
_CHILD = ROOT / "benchmarks" / "comparison" / "cclora_child.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    reason = why_not()
    if reason is not None:
        print(f"skipped: this machine gives no network namespace with a limited rate ({reason})")
        return 0
    sizes = Sizes(
        hidden_size=options.hidden_size,
        ffn_hidden_size=options.hidden_size * 43 // 16,
        heads=options.hidden_size // 128 or 1,
        layers=options.layers,
        seq_length=options.seq_length,
    )
    facts = {
        "benchmark": "cclora",
        "command": shlex.join(["python", "benchmarks/cclora.py", *words]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "sizes": dataclasses.asdict(sizes),
        "ranks": 2,
    }
    asked = {"ranks": 2, "repeats": options.repeats, "ratios": _RATIOS, "sizes": dataclasses.asdict(sizes)}
    try:
        found = _measured(asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    found = {**facts, **found, "rates": [with_figures(rate) for rate in found["rates"]]}
    print(text(found))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def _measured(asked: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="cclora-") as made:
        target, log = Path(made, "found.json"), Path(made, "log")
        run_child([str(_CHILD), json.dumps(asked), str(target)], 1, log, within=NAMESPACE)
        found: dict[str, Any] = json.loads(target.read_text())
        return found


def with_figures(rate: dict[str, Any], plainest: str = "unfused") -> dict[str, Any]:
    """What follows from the seconds, for every way; speedups are over ``plainest``."""
    compute, communication = rate["compute_seconds"], rate["communication_seconds"]
    medians = {name: statistics.median(seconds) for name, seconds in rate["step_seconds"].items()}
    figures = {
        name: {
            "seconds": seconds,
            "speedup": medians[plainest] / seconds,
            "hidden": 1 - (seconds - compute) / communication,
            "of_bound": seconds / max(compute, communication),
        }
        for name, seconds in medians.items()
    }
    return {**rate, "ways": figures}


def text(found: dict[str, Any]) -> str:
    """The tables of every link rate, and the plans that were chosen."""
    blocks = []
    for rate in found["rates"]:
        compute, communication = rate["compute_seconds"], rate["communication_seconds"]
        named = (
            "link not limited"
            if rate["ratio"] is None
            else f"link at {rate['bytes_per_second'] / 1e6:.0f} MB/s"
        )
        rows = [
            [
                name,
                f"{figures['seconds']:.3f}",
                f"{figures['speedup']:.2f}",
                f"{100 * figures['hidden']:.0f}%",
                f"{figures['of_bound']:.2f}",
                f"{rate['peak_bytes'][name] / 2**20:.0f}",
            ]
            for name, figures in rate["ways"].items()
        ]
        heading = ["", "step, s", "times unfused", "hidden", "of the bound", "peak, MiB"]
        title = f"{named}: compute alone {compute:.3f} s, communication alone {communication:.3f} s"
        chosen = "; ".join(f"{kind} {plan}" for kind, plan in rate["plans"]["fused"].items())
        blocks.append(f"{title}\n{table(heading, rows)}\nfused: {chosen}")
    return "\n\n".join(blocks)


def _parser() -> argparse.ArgumentParser:
    description, _, _ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--hidden-size", type=int, default=1024, help="a quarter of Llama-2-7B's (default: %(default)s)")
    add("--layers", type=int, default=2, help="(default: %(default)s)")
    add("--seq-length", type=int, default=512, help="of the two rows of a micro-batch (default: %(default)s)")
    add("--repeats", type=int, default=5, help="measured steps of each way and rate (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write everything to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
