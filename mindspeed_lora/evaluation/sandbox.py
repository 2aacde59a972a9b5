"""Runs a program that a model has written, confined as ``sandbox_child.py`` says."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mindspeed_lora.errors import Failed

_CHILD = Path(__file__).with_name("sandbox_child.py")
CANNOT_CONFINE = 97
"""Exit status of a child that could not confine itself; it has then run nothing."""
MEMORY_BYTES = 2 << 30
"""Most address space of a program."""
_LONGEST_START = 20.0
"""Seconds that the interpreter may take to start, on a busy machine, beside the program's own."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool
    """It ran to its last line."""
    reason: str
    """``passed``, ``failed`` or ``timed out``."""


def run_program(program: str, timeout: float) -> Outcome:
    """Runs a program for at most ``timeout`` seconds.

    Raises:
        Failed: this system offers no way to confine it.
    """
    # A program that leaves early must not look like one that came to its end.
    password = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="evaluation-") as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_CHILD), str(timeout), str(MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            output = _talk(child, f"{password}\n{program}".encode("utf-8", "replace"), timeout)
        finally:
            _end(child)
    if output is None:
        return Outcome(False, "timed out")
    if child.returncode == CANNOT_CONFINE:
        raise Failed("programs cannot be confined here: this needs Linux on x86-64 or ARM64 with seccomp")
    if child.returncode == -signal.SIGXCPU:
        return Outcome(False, "timed out")
    passed = child.returncode == 0 and output == password.encode()
    return Outcome(passed, "passed" if passed else "failed")


def _talk(child: subprocess.Popen[bytes], program: bytes, timeout: float) -> bytes | None:
    """Gives the child its program; returns what it says, None where it does not end in time."""
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(program)
        child.stdin.close()
        child.wait(timeout + _LONGEST_START)
    except BrokenPipeError:
        child.wait(timeout + _LONGEST_START)
    except subprocess.TimeoutExpired:
        return None
    return child.stdout.read1(1 << 12)  # type: ignore[attr-defined]


def _end(child: subprocess.Popen[bytes]) -> None:
    """Nothing of the program is left, whatever it has started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None and not pipe.closed:
            pipe.close()
