"""Whether the save that SIGTERM leads to fits the seconds that a scheduler gives, told before it must.

Between the signal and the end of the save lie the step under way and the save itself. A save that was not seen yet is
estimated from its size and from what a probe writes to the same folder in a second.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

_PROBE_BYTES = 4 << 20
_OVERHEAD_SECONDS = 0.5


class SaveGrace:
    """Watches steps and saves; has one sentence to say, at most once for estimates and once for measurements."""

    def __init__(self, grace_seconds: float, estimated_save_seconds: float) -> None:
        self._grace = grace_seconds
        self._save = estimated_save_seconds
        self._is_measured = False
        self._step = 0.0
        self._told: set[bool] = set()

    def after_step(self, seconds: float) -> str | None:
        """The sentence, if it is due after a step that took so long."""
        # The first step makes what later ones find.
        self._step = seconds if self._step == 0.0 else max(min(self._step, seconds * 2), seconds)
        return self._sentence()

    def after_save(self, seconds: float) -> str | None:
        """The sentence, if it is due after a save that took so long."""
        self._save = max(self._save, seconds) if self._is_measured else seconds
        self._is_measured = True
        return self._sentence()

    def _sentence(self) -> str | None:
        needed = self._step + self._save
        if needed <= self._grace or self._is_measured in self._told:
            return None
        self._told.add(self._is_measured)
        kind = "took" if self._is_measured else "is estimated to take"
        return (
            f"a save {kind} {self._save:.0f} s and a step up to {self._step:.0f} s, more than "
            f"--sigterm-grace-seconds {self._grace:g}: after SIGTERM this run may be killed before its save is whole, "
            "and would then go on from the checkpoint before; raise the scheduler's grace "
            "(terminationGracePeriodSeconds, --signal=TERM@…) and this flag, or lower --save-interval"
        )


def estimate_save_seconds(folder: Path, size: int) -> float:
    """Seconds for writing ``size`` bytes into a folder and flushing them, by a probe of a few mebibytes."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            content = os.urandom(_PROBE_BYTES)
            started = time.perf_counter()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - started
    except OSError:
        return 0.0
    return _OVERHEAD_SECONDS + size * seconds / _PROBE_BYTES
