"""Which process of which node a rank is, so that its peers can see whether it still runs.

A rank that is killed says nothing more. On its own node that shows at once in ``/proc``; of another node only the
silence of its beats tells (:mod:`mindspeed_lora.parallel.heartbeat`).
"""

from __future__ import annotations

import os
import platform
from pathlib import Path


def this_process() -> str:
    """What other ranks are told: node and namespace of numbers, number, and when it was started."""
    number = os.getpid()
    return f"{_numbers()} {number} {_started(number)}"


def has_ended(process: str) -> bool | None:
    """Whether the process of :func:`this_process` has ended; None where that cannot be seen from here."""
    numbers, number, started = process.rsplit(" ", 2)
    if numbers != _numbers() or not Path("/proc/self/stat").exists():
        return None
    return _started(int(number)) != started


def _numbers() -> str:
    """Node and namespace that a process's number belongs to; containers of one node have their own."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{platform.node()}/{namespace}"


def _started(number: int) -> str:
    """Ticks since the node's start; empty of a process that has ended, be it that nobody has taken note of it yet."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except OSError:
        return ""
    state, ticks = fields.split()[0], fields.split()[19]
    return "" if state in "ZXx" else ticks
