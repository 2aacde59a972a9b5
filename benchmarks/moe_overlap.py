"""--moe-alltoall-overlap-comm over a slow link: two expert-parallel ranks whose loopback lets only so much pass.

    python benchmarks/moe_overlap.py --json benchmarks/results/moe_overlap.json

Layers of experts of SmolLM2's sizes with an adapter on every linear, under EP 2, forward and backward. Link rates are
chosen such that the exchanges of tokens alone take 0.25, 0.5 and 1 times the compute alone, which is the waiting step
with its collectives replaced by local copies. Every way runs by turns with the others. Hidden is ``1 − (step −
compute) / communication``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cclora import with_figures
from comparison.machine import commit, machine, versions
from comparison.process import ROOT, run_child
from comparison.rate_limited_link import NAMESPACE, why_not
from comparison.table import table

from mindspeed_lora.errors import UserError

HIDDEN_BAR = 0.7
"""Share of the exchanges' time that is to be hidden where they take half of the compute."""
_RATIOS = (0.25, 0.5, 1.0, None)
"""Communication to compute; None: the link as it is."""
_CHILD = ROOT / "benchmarks" / "comparison" / "expert_overlap_child.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    reason = why_not()
    if reason is not None:
        print(f"skipped: this machine gives no network namespace with a limited rate ({reason})")
        return 0
    sizes = {
        "hidden_size": options.hidden_size,
        "ffn_hidden_size": options.hidden_size * 8 // 3,
        "layers": options.layers,
        "seq_length": options.seq_length,
    }
    facts = {
        "benchmark": "moe_overlap",
        "command": shlex.join(["python", "benchmarks/moe_overlap.py", *words]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "sizes": sizes,
        "ranks": 2,
    }
    asked = {"ranks": 2, "repeats": options.repeats, "ratios": _RATIOS, "sizes": sizes}
    try:
        found = {**facts, **_measured(asked)}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    found["rates"] = [with_figures(rate, "waits") for rate in found["rates"]]
    print(text(found))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def _measured(asked: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="moe_overlap-") as made:
        target, log = Path(made, "found.json"), Path(made, "log")
        run_child([str(_CHILD), json.dumps(asked), str(target)], 1, log, within=NAMESPACE)
        found: dict[str, Any] = json.loads(target.read_text())
        return found


def text(found: dict[str, Any]) -> str:
    """The tables of every link rate."""
    blocks = []
    for rate in found["rates"]:
        compute, communication = rate["compute_seconds"], rate["communication_seconds"]
        link = (
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
                f"{rate['peak_bytes'][name] / 2**20:.0f}",
            ]
            for name, figures in rate["ways"].items()
        ]
        title = f"{link}: compute alone {compute:.3f} s, exchanges alone {communication:.3f} s"
        heading = ["", "step, s", "times waiting", "hidden", "peak, MiB"]
        blocks.append(f"{title}\n{table(heading, rows)}")
        if rate["ratio"] == 0.5:
            blocks[-1] += f"\nto be hidden at this rate: at least {HIDDEN_BAR:.0%}"
    return "\n\n".join(blocks)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--hidden-size", type=int, default=576, help="a multiple of 192 (default: %(default)s)")
    add("--layers", type=int, default=4, help="(default: %(default)s)")
    add("--seq-length", type=int, default=512, help="of the two rows of a micro-batch (default: %(default)s)")
    add("--repeats", type=int, default=5, help="measured steps of each way and rate (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write everything to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
