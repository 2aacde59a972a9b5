"""Lines on standard output, and on a terminal one live line below them.

Assumes that one process of the job writes. What nobody can read any more (a closed pipe, a lost terminal, a
full disk behind a redirection) never stops a training run: the output is dropped.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import TextIO

_CLEAR = "\r\x1b[K"


class Console:
    """Standard output with a live line; off a terminal it never writes a carriage return."""

    def __init__(
        self, is_terminal: bool | None = None, output: TextIO | None = None, errors: TextIO | None = None
    ) -> None:
        """``is_terminal`` None: whether ``output`` is one; the streams default to the process's own."""
        self._output = sys.stdout if output is None else output
        self._errors = sys.stderr if errors is None else errors
        self.is_terminal = _is_terminal(self._output) if is_terminal is None else is_terminal
        self._live = ""

    @property
    def width(self) -> int:
        """Columns that the live line may have."""
        return max(1, shutil.get_terminal_size().columns - 1)

    def line(self, text: str) -> None:
        """Print a line (or several), above the live line if there is one."""
        self._write(self._output, f"{self._clear()}{text}\n{self._live}")

    def notice(self, text: str) -> None:
        """Print a notice on standard error, above the live line if there is one."""
        if self._live:
            self._write(self._output, _CLEAR)
        self._write(self._errors, f"notice: {text}\n")
        if self._live:
            self._write(self._output, self._live)

    def live(self, text: str) -> None:
        """Replace the live line; only on a terminal, cut to its width so that it never wraps."""
        if self.is_terminal:
            clear = self._clear() or "\r"
            self._live = text[: self.width]
            self._write(self._output, clear + self._live)

    def close(self) -> None:
        """Leave the live line as it stands and go on below it."""
        if self._live:
            self._live = ""
            self._write(self._output, "\n")

    def _clear(self) -> str:
        return _CLEAR if self._live else ""

    def _write(self, stream: TextIO, text: str) -> None:
        try:
            stream.write(_encodable(text, stream))
            stream.flush()
        except (OSError, ValueError):
            _discard(stream)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:
        return False


def _encodable(text: str, stream: TextIO) -> str:
    """The text with what the stream's encoding lacks written as escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)


def _discard(stream: TextIO) -> None:
    """Send a stream that cannot be written to nowhere, so that flushing it at exit does not fail either."""
    try:
        target = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, target)
        os.close(nowhere)
    except (OSError, ValueError):
        return
