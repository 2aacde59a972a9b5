"""Peak memory of a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def peak(*words: str) -> int:
    """``ru_maxrss`` in bytes of this Python with these arguments."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}",
        "OMP_NUM_THREADS": "1",
    }
    # A child begins at what its parent holds, so a small one stands between.
    measure = "import os, sys, resource, subprocess; subprocess.run(sys.argv[1:], check=True, stdout=2); "
    measure += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    command = [sys.executable, "-c", measure, sys.executable, *words]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout.split()[-1])
