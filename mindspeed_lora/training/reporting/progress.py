"""How far the run is and when it will be done."""

from __future__ import annotations

from collections import deque

from mindspeed_lora.training.reporting.iteration_line import GIB
from mindspeed_lora.training.reporting.records import StepRecord

OFF_TERMINAL_SECONDS = 10.0
"""Least time between two progress lines off a terminal."""

ON_TERMINAL_SECONDS = 0.1
"""Least time between two drawings of the live line."""

_WINDOW = 50
_BAR = 16


class Progress:
    """Counts steps by the clock; what lies between steps (evaluation, saving) is in the estimate too."""

    def __init__(self, total_steps: int, is_terminal: bool, now: float) -> None:
        self._total = total_steps
        self._is_terminal = is_terminal
        self._last: StepRecord | None = None
        self._shown = now
        self._begin = now
        self._moments: deque[tuple[int, float]] = deque(maxlen=_WINDOW + 1)

    def step(self, record: StepRecord, now: float) -> None:
        """Note a step that has just ended."""
        if not self._moments:
            # The first step of this process has no predecessor to measure from: its own time stands in.
            self._moments.append((record.iteration - 1, now - record.elapsed_ms / 1000.0))
        self._moments.append((record.iteration, now))
        self._last = record

    def due(self, now: float) -> bool:
        """Whether a progress line may be shown now; True starts a new wait."""
        done = self._is_terminal and self._last is not None and self._last.iteration >= self._total
        if not done and now - self._shown < (
            ON_TERMINAL_SECONDS if self._is_terminal else OFF_TERMINAL_SECONDS
        ):
            return False
        self._shown = now
        return True

    def remaining_seconds(self) -> float:
        """Estimate for the steps that are left, from the latest ones."""
        if len(self._moments) < 2:
            return 0.0
        (first, begin), (last, end) = self._moments[0], self._moments[-1]
        return max(0.0, (end - begin) / max(1, last - first) * (self._total - last))

    def text(self, now: float, width: int | None = None) -> str:
        """The progress line, with a bar on a terminal; of its fields as many as ``width`` has room for."""
        if self._last is None:
            return ""
        share = min(1.0, self._last.iteration / max(1, self._total))
        filled = int(share * _BAR)
        head = f"[{'#' * filled}{'-' * (_BAR - filled)}]" if self._is_terminal else "progress"
        fields = [
            f" {head} {self._last.iteration}/{self._total} {share:4.0%}",
            f"ETA {clock_time(self.remaining_seconds())}",
            f"loss {self._last.lm_loss:.4f}",
            f"{self._last.tokens_per_second:,.0f} tokens/s",
            f"{self._last.peak_memory_bytes / GIB:.2f} GiB",
            f"{clock_time(now - self._begin)} gone",
        ]
        while width is not None and len(fields) > 1 and len(" | ".join(fields)) > width:
            fields.pop()
        return " | ".join(fields)


def clock_time(seconds: float) -> str:
    """Seconds as ``h:mm:ss``, with days in front where there are any."""
    minutes, second = divmod(int(round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"
