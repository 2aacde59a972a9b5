"""One child process: its environment, its log, and the memory that it took.

The parent stays small, since a child's largest resident size begins at what the parent holds when it starts it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mindspeed_lora.errors import Failed

ROOT = Path(__file__).resolve().parents[2]
KEPT_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647:glibc.malloc.top_pad=67108864"
}
"""glibc's counterpart of the ``mallopt`` calls in ``mindspeed_lora/device/runtime.py``."""
_PACKAGE_FOLDERS = (ROOT, ROOT / "benchmarks")


@dataclass(frozen=True)
class Ended:
    """A child that ended well."""

    seconds: float
    peak_memory_bytes: int
    """``ru_maxrss``."""


def run_child(
    arguments: Sequence[str],
    threads: int,
    log: Path,
    environment: Mapping[str, str] | None = None,
    within: Sequence[str] = (),
) -> Ended:
    """Run this Python with ``arguments`` and what ``environment`` adds; its output goes to ``log``.

    ``within`` is a command that runs it, such as ``unshare``.

    Raises:
        Failed: the child ended with another status than 0.
    """
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*within, sys.executable, *arguments],
            cwd=ROOT,
            env={**_environment(threads), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise Failed(
            f"{' '.join(arguments[:3])} ended with status {process.returncode}: {_last_line(log)}; "
            f"its output is in {log}"
        )
    # In kilobytes on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return Ended(seconds=time.monotonic() - started, peak_memory_bytes=usage.ru_maxrss * unit)


def _environment(threads: int) -> dict[str, str]:
    """The parent's environment, without accelerators and without the hub."""
    environment = dict(os.environ)
    folders = [str(folder) for folder in _PACKAGE_FOLDERS]
    environment["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, [environment.get("PYTHONPATH")])])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[name] = str(threads)
    environment.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    return environment


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
