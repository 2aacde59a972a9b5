"""One layer over a slow link, unfused and fused: a trace of each, and a picture of both.

    python tools/layer_timeline.py --picture docs/cclora_timeline.png --traces docs/traces

Two tensor-parallel ranks with sequence parallelism, whose link carries the base's collectives in as much time as the
compute alone takes, as in `benchmarks/cclora.py`. The traces are the torch profiler's of rank 0 (Chrome's format,
gzipped: Perfetto opens them); the picture shows the operations that compute and the collectives in them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from comparison.process import run_child  # noqa: E402
from comparison.rate_limited_link import NAMESPACE, bring_up, why_not  # noqa: E402
from comparison.sizes import Sizes  # noqa: E402

from mindspeed_lora.errors import UserError  # noqa: E402

_SIZES = Sizes(layers=1)
_WAYS = ("unfused", "fused", "interleaved")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
Span = tuple[float, float]
"""Start and length, in milliseconds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, draw, write; the exit status."""
    options = _parser().parse_args(arguments)
    if options.rank_folder is not None:
        _ranks(options.rank_folder)
        return 0
    reason = why_not()
    if reason is not None:
        print(f"skipped: this machine gives no network namespace with a limited rate ({reason})")
        return 0
    options.traces.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="layer_timeline-") as made:
        try:
            child = [str(Path(__file__).resolve()), "--rank-folder", made]
            run_child(child, 1, Path(made, "log"), within=NAMESPACE)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_status
        found = {name: json.loads(Path(made, f"{name}.json").read_text())["traceEvents"] for name in _WAYS}
    for name, events in found.items():
        # What else the profiler writes names folders of the machine.
        kept = json.dumps({"displayTimeUnit": "ms", "traceEvents": events})
        Path(options.traces, f"layer_{name}.json.gz").write_bytes(gzip.compress(kept.encode()))
    draw({name: spans(events) for name, events in found.items()}, options.picture)
    print(f"written: {options.picture} and {options.traces}/layer_*.json.gz")
    return 0


def _ranks(folder: Path) -> None:
    """Both ranks; started without ``RANK``, starts them."""
    if "RANK" not in os.environ:
        bring_up()
        environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29401"}
        ranks = [
            subprocess.Popen([sys.executable, *sys.argv], env={**environment, "RANK": str(rank)})
            for rank in range(2)
        ]
        sys.exit(max(process.wait() for process in ranks))
    import torch
    from comparison.cclora_child import WAYS, Sweep, joined_layers

    layers, is_main = joined_layers(2, _SIZES)
    sweep = Sweep(layers, is_main, repeats=3)
    sweep.limit_to(1.0)
    for way in WAYS:
        if way.name not in _WAYS:
            continue
        layers.use(layers.choose(way), way.interleave)
        sweep.time(layers.step)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            sweep.time(layers.step)
        if is_main:
            profile.export_chrome_trace(str(folder / f"{way.name}.json"))


def spans(events: Sequence[dict[str, Any]]) -> dict[str, list[Span]]:
    """When there was what, from the first event on: products, other operations, collectives."""
    kinds: dict[str, list[Span]] = {"products": [], "element-wise": [], "collectives": []}
    timed = [
        event
        for event in events
        if event.get("ph") == "X" and event.get("cat") in ("cpu_op", "user_annotation")
    ]
    start = min(event["ts"] for event in timed)
    for event in timed:
        span = (event["ts"] - start) / 1e3, event.get("dur", 0) / 1e3
        name = event["name"]
        if name.startswith("gloo:"):
            if "barrier" not in name:
                kinds["collectives"].append(span)
        elif name in _PRODUCTS:
            kinds["products"].append(span)
        elif name.startswith("aten::") and span[1] > 0.02:
            kinds["element-wise"].append(span)
    return kinds


def draw(found: dict[str, dict[str, list[Span]]], target: Path) -> None:
    """A pair of lanes for each way, on one time axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(found), 1, sharex=True, figsize=(12, 1.6 * len(found) + 1), squeeze=False
    )
    colours = {"products": "#2a6fbb", "element-wise": "#9cc3e6", "collectives": "#d9822b"}
    for axis, (name, kinds) in zip(axes[:, 0], found.items(), strict=True):
        for kind in ("element-wise", "products", "collectives"):
            lane = (0, 8) if kind == "collectives" else (10, 8)
            axis.broken_barh(kinds[kind], lane, facecolors=colours[kind], label=kind)
        axis.set_yticks([4, 14], ["travels", "computes"])
        end = max(first + length for kind in kinds.values() for first, length in kind)
        axis.set_title(f"{name}: {end:.0f} ms", loc="left", fontsize=10)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[-1, 0].set_xlabel("milliseconds, rank 0 of 2: forward and backward pass of one layer")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=3, frameon=False)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def _parser() -> argparse.ArgumentParser:
    description, _, _ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--picture", type=Path, default=Path("layer_timeline.png"), metavar="FILE.png")
    parser.add_argument("--traces", type=Path, default=Path("traces"), metavar="FOLDER")
    parser.add_argument("--rank-folder", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
