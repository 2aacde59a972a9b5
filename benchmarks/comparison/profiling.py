"""Runs the profile of ours and puts it into words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from comparison.process import run_child
from comparison.setting import Inputs, Setting
from comparison.sides import ours_flags
from comparison.table import table

_PROFILED_STEPS = 2


def profile_ours(setting: Setting, inputs: Inputs, rows_at_once: int | None, folder: Path) -> dict[str, Any]:
    """Figures of a profiled step of our trainer: see :mod:`comparison.profile_child`."""
    request, result = folder / "request.json", folder / "result.json"
    wanted = {
        "flags": ours_flags(setting, inputs, rows_at_once),
        "warmup": setting.warmup,
        "steps": min(setting.steps, _PROFILED_STEPS),
        "rank": setting.rank,
        "result": str(result),
    }
    request.write_text(json.dumps(wanted))
    run_child(["-m", "comparison.profile_child", str(request)], setting.threads, folder / "log")
    measured: dict[str, Any] = json.loads(result.read_text())
    return {"rows_at_once": rows_at_once, **measured}


def profile_text(profile: dict[str, Any]) -> str:
    """The parts of a step, the slowest operations, and how near the products come to the machine's best."""
    wall = profile["profiled_step_ms"]
    parts = [
        [name, f"{part['ms']:.0f}", f"{part['ms'] / wall:.1%}", *_work(part)]
        for name, part in profile["parts"].items()
    ]
    operations = [
        [f"`{op['name']}`", f"{op['calls']:.0f}", f"{op['ms']:.0f}", f"{op['ms'] / wall:.1%}"]
        for op in profile["slowest"]
    ]
    shape = " × ".join(map(str, profile["peak_shape"]))
    return "\n\n".join(
        [
            f"Where a step of ours goes ({_rows(profile)}, mean of {profile['steps']} steps)",
            table(["part", "ms a step", "share", "GFLOP", "GFLOP/s"], parts),
            table(["operation", "calls", "ms a step", "share"], operations),
            f"A step takes {profile['step_ms']:.0f} ms, {wall:.0f} ms under the profiler. Its products, those of "
            f"attention included, are {profile['gflop']:.0f} GFLOP: {profile['gflop_per_second']:.1f} GFLOP/s, "
            f"{profile['share_of_peak']:.0%} of the best fp32 product of this run "
            f"({profile['peak_gflop_per_second']:.1f} GFLOP/s, {shape}).",
        ]
    )


def _rows(profile: dict[str, Any]) -> str:
    rows = profile["rows_at_once"]
    return "packed" if rows is None else f"{rows} a micro-batch"


def _work(part: dict[str, float]) -> list[str]:
    if not part["gflop"]:
        return ["", ""]
    return [f"{part['gflop']:.1f}", f"{part['gflop'] / part['ms'] * 1000:.1f}"]
