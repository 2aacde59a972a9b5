"""Memory that a piece of work takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path


def peak_above(work: Callable[[], None]) -> int:
    """Bytes that the process's largest resident size rises by while the work runs."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)
