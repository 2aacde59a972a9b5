"""The default model and rows of every benchmark."""

from __future__ import annotations

import subprocess
import sys

from comparison.process import ROOT
from mindspeed_lora.errors import Failed


def assets() -> dict[str, str]:
    """Folders ``MODEL``, ``PADDED_MODEL`` and ``DATA``, fetched when they are not there yet."""
    command = [sys.executable, str(ROOT / "tools" / "fetch_assets.py")]
    fetched = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if fetched.returncode != 0:
        raise Failed(
            "tools/fetch_assets.py could not fetch the default model and rows; give --model and --data"
        )
    return dict(line.split("=", 1) for line in fetched.stdout.splitlines() if "=" in line)
