import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from comparison.process import ROOT, run_child

from mindspeed_lora.errors import Failed
from tests.unit.benchmarks.conftest import BENCHMARKS


def in_new_process(code: str) -> str:
    """What ``code`` prints in a Python of its own that finds the benchmarks."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(BENCHMARKS)])}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_peak_memory_is_that_of_the_child(tmp_path: Path) -> None:
    """Started by a small process, as the script is: this one holds torch, and a child's peak begins there."""
    code = f"""
import json
from pathlib import Path
from comparison.process import run_child
peaks = [
    run_child(["-c", f"block = bytearray(b'x') * {{size}}"], 1, Path({str(tmp_path)!r}, "log")).peak_memory_bytes
    for size in (1, 200_000_000)
]
print(json.dumps(peaks))
"""
    small, large = json.loads(in_new_process(code))
    assert small < 60_000_000
    assert 190_000_000 < large - small < 210_000_000


def test_the_script_itself_stays_small() -> None:
    loaded = in_new_process("import sys, train_vs_trl; print(*sys.modules)").split()
    assert "comparison.process" in loaded
    assert not {"torch", "numpy", "transformers"} & set(loaded)


def test_a_child_has_its_threads_and_finds_the_package(tmp_path: Path) -> None:
    code = "import os, comparison, mindspeed_lora; print(os.environ['OMP_NUM_THREADS'])"
    ended = run_child(["-c", code], 3, tmp_path / "log")
    assert (tmp_path / "log").read_text() == "3\n"
    assert ended.seconds > 0


def test_a_child_that_fails_is_told_by_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(
        Failed, match=f"ended with status 1: ValueError: no good; its output is in {tmp_path}/log"
    ):
        run_child(["-c", "print('begun', flush=True); raise ValueError('no good')"], 1, tmp_path / "log")


def test_a_child_that_is_killed_is_told(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="ended with status -9: it printed nothing"):
        run_child(["-c", "import os; os.kill(os.getpid(), 9)"], 1, tmp_path / "log")
