"""The check of a GPU, as far as it goes without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_check_report
import pytest

SCRIPT = gpu_check_report.ROOT / "tools" / "gpu_check.sh"
FAKE = """#!/bin/sh
# An interpreter whose torch sees a GPU.
case "$*" in *is_available*) exit 0;; esac
exec {python} "$@"
"""
JUNIT = """<testsuites><testsuite><testcase classname="a" name="good"/>
<testcase classname="a" name="bad"><failure>x</failure></testcase>
<testcase classname="a" name="none"><skipped/></testcase></testsuite></testsuites>"""


def check(**environment: str) -> subprocess.CompletedProcess[str]:
    """The script, on a machine without a GPU."""
    given = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(["bash", str(SCRIPT)], env=given, capture_output=True, text=True)


def test_without_a_gpu_it_says_so() -> None:
    done = check(WHEELS="/nowhere")
    assert done.returncode == 2
    assert done.stderr == "error: torch sees no CUDA GPU on this machine; gpu_check.sh needs one\n"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PYTHON": "/no/python"}, "PYTHON=/no/python: no such interpreter"),
        ({"WHEELS": ""}, "WHEELS is not set"),
        ({"WHEELS": "/nowhere"}, "WHEELS=/nowhere holds no megatron_core-0.16.1 wheel"),
    ],
)
def test_what_is_missing_is_told_in_one_sentence(
    environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    fake = tmp_path / "python"
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(0o755)
    done = check(**{"PYTHON": str(fake), **environment})
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_wheels_that_do_not_suffice(tmp_path: Path) -> None:
    fake, wheels = tmp_path / "python", tmp_path / "wheels"
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(0o755)
    wheels.mkdir()
    (wheels / "megatron_core-0.16.1-py3-none-any.whl").write_bytes(b"")
    done = check(PYTHON=str(fake), WHEELS=str(wheels))
    assert done.returncode == 2
    assert f"WHEELS={wheels} does not suffice: " in done.stderr and done.stderr.count("\n") == 1


def test_the_script_is_valid_bash() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", str(SCRIPT)]).returncode == 0


def test_requirements_leave_torch_to_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check_report.main(["--requirements"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "megatron-core==0.16.1" in lines and "pytest" in lines
    assert not any(line.startswith("torch>") for line in lines)


@pytest.mark.parametrize("ran", [True, False])
def test_report(tmp_path: Path, ran: bool) -> None:
    tests, benchmark, out = tmp_path / "tests.xml", tmp_path / "bench.json", tmp_path / "new" / "out.json"
    if ran:
        tests.write_text(JUNIT)
        benchmark.write_text('{"sides": []}')
    words = ["--tests", str(tests), "--benchmark", str(benchmark), "--out", str(out)]
    assert gpu_check_report.main(words) == 0
    report = json.loads(out.read_text())
    expected = {"passed": 1, "failed": ["a::bad"], "skipped": 1, "ended": True}
    assert report["tests"] == (expected if ran else {"passed": 0, "failed": [], "skipped": 0, "ended": False})
    assert report["benchmark"] == ({"sides": []} if ran else None)
    assert {"device", "versions", "commit", "date"} <= set(report)
