"""Lines that a person or a pipe gives, read by one rank while the others wait."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable


class StandardInput:
    """Reads lines from standard input.

    Args:
        alone: no other process waits; a terminal then has line editing and a history.
        patience: seconds of silence after which ``waiting`` is called, so that peers do not give up.
    """

    def __init__(self, alone: bool, patience: float) -> None:
        self._patience = patience
        self._rest = b""
        self._ended = sys.stdin is None
        self._editing = alone and not self._ended and sys.stdin.isatty()
        if self._editing:
            import readline  # noqa: F401  (its import gives input() line editing)

            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(errors="replace")

    def line(self, prompt: str, waiting: Callable[[], None]) -> str | None:
        """The next line without its end; None when there is none any more."""
        if self._editing:
            try:
                return input(prompt)
            except EOFError:
                return None
        print(prompt, end="", flush=True)
        while b"\n" not in self._rest and not self._ended:
            self._read(waiting)
        if not self._rest:
            return None
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode("utf-8", "replace").rstrip("\r")

    def _read(self, waiting: Callable[[], None]) -> None:
        # Not through sys.stdin: what its buffer holds would not be seen by select.
        descriptor = sys.stdin.fileno()
        if not select.select([descriptor], [], [], self._patience)[0]:
            waiting()
            return
        chunk = os.read(descriptor, 1 << 16)
        self._ended = not chunk
        self._rest += chunk
