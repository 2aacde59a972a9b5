"""Seconds from the command to the first step, and of importing the package.

    python benchmarks/start_up.py --json benchmarks/results/start_up.json

One optimizer step of SmolLM2-135M on the demo rows, with warm caches: the first start of several is left out. What
is counted ends with the first line of ``metrics.jsonl``, less the time of that step.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from comparison.assets import assets
from comparison.inputs import make_inputs
from comparison.process import run_child
from comparison.report import Facts
from comparison.setting import Setting
from comparison.sides import ours_flags, steps_of

IMPORT = "import mindspeed_lora, mindspeed_lora.entry"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="starts that count (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to this file")
    options = parser.parse_args(words)
    found = assets()
    setting = Setting(model=found["MODEL"], data=f"{found['DATA']}/alpaca_en_demo.json", warmup=0, steps=1)
    facts = Facts.now(setting, shlex.join(["python", "benchmarks/start_up.py", *words]))
    starts, imports = [], []
    with tempfile.TemporaryDirectory(prefix="start_up-") as made:
        folder = Path(made)
        inputs = make_inputs(setting, folder)
        for number in range(options.repeats + 1):
            save, log = folder / f"run{number}", folder / "log"
            flags = ours_flags(replace(setting, global_batch_size=1), inputs, 1)
            launched = time.time()
            run_child(["posttrain_gpt.py", *flags, "--save", str(save)], setting.threads, log)
            step = steps_of(save)[0].elapsed_ms / 1000
            starts.append((save / "metrics.jsonl").stat().st_mtime - launched - step)
            imports.append(run_child(["-c", IMPORT], setting.threads, log).seconds)
    start, load = statistics.median(starts[1:]), statistics.median(imports[1:])
    print(f"command to first step: {start:.1f} s; importing the package: {load:.2f} s")
    if options.json is not None:
        content = {"benchmark": "start_up", **facts.to_json(), "start_seconds": start, "import_seconds": load}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
