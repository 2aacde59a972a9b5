"""Writes ``demo_lengths.json`` beside this file: tokens and loss-carrying tokens of each demo row.

PYTHONPATH=benchmarks:. python -m comparison.demo_lengths
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from comparison.assets import assets
from comparison.inputs import make_inputs
from comparison.setting import Setting


def main() -> None:
    """Prepare the demo rows as the CPU benchmark does, and write how long they are."""
    found = assets()
    setting = Setting(model=found["MODEL"], data=f"{found['DATA']}/alpaca_en_demo.json")
    with tempfile.TemporaryDirectory() as folder:
        lengths = make_inputs(setting, Path(folder)).lengths
    target = Path(__file__).with_name("demo_lengths.json")
    target.write_text(json.dumps({"lengths": lengths}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
