"""How far preparing is, with rates: a live bar on a terminal, else a line now and then."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

_BAR_WIDTH = 24
_SECONDS_BETWEEN_REDRAWS = 0.2
_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts rows and tokens; off a terminal at most a line in ten seconds and in ``log_interval`` rows."""

    def __init__(
        self,
        log_interval: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._live = self._stream.isatty()
        self._log_interval = log_interval
        self._clock = clock
        self._start = self._last_time = clock()
        self._last_rows = 0
        self._width = 0
        self.rows = 0
        self.tokens = 0

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return self._clock() - self._start

    def update(self, rows: int, tokens: int, fraction: float) -> None:
        """Add rows and tokens that are done; ``fraction`` of all input has been read."""
        self.rows += rows
        self.tokens += tokens
        waited = self._clock() - self._last_time
        if self._live:
            due = waited >= _SECONDS_BETWEEN_REDRAWS
        else:
            enough_rows = self.rows - self._last_rows >= self._log_interval
            due = waited >= _SECONDS_BETWEEN_LINES and enough_rows
        if due:
            self._last_time, self._last_rows = self._clock(), self.rows
            self._show(fraction)

    def close(self) -> None:
        """Remove the live bar."""
        if self._live and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()

    def _show(self, fraction: float) -> None:
        text = self._text(min(max(fraction, 0.0), 1.0))
        if self._live:
            # A line that wraps could not be written over.
            text = text[: shutil.get_terminal_size().columns - 1]
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def _text(self, fraction: float) -> str:
        seconds = max(self.seconds, 1e-9)
        left = f", {_duration(seconds / fraction - seconds)} left" if fraction > 0 else ""
        rates = f"{self.rows / seconds:,.0f} rows/s, {self.tokens / seconds:,.0f} tokens/s"
        counts = f"{self.rows:,} rows, {self.tokens:,} tokens ({rates}){left}"
        if not self._live:
            return f"prepared {fraction:.0%}: {counts}"
        filled = round(fraction * _BAR_WIDTH)
        return f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {fraction:4.0%} {counts}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
