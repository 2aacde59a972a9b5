"""Why a run should stop before its end: a signal, or a time limit.

What is here is the wish of one process. The ranks must agree before they act on it: the reasons are numbers,
so that the largest over the ranks is the reason of all.
"""

from __future__ import annotations

import enum
import os
import signal
import time
from types import FrameType, TracebackType

LEFT_EARLY = 75
"""Exit status of a run that saved and left because of a signal or a time limit."""

_SECONDS_PER_MINUTE = 60.0


class StopReason(enum.IntEnum):
    """Why to stop, the most urgent with the largest number; 0 (false) is: go on."""

    NONE = 0
    TIME_LIMIT = 1
    SIGUSR1 = 2
    SIGTERM = 3

    def describe(self) -> str:
        """The reason in words, for the log."""
        if self is StopReason.TIME_LIMIT:
            return "--exit-duration-in-mins is over"
        return f"{self.name} received" if self else "not stopped"


class StopRequest:
    """Listens for SIGTERM and SIGUSR1 and watches the time, from its creation until :meth:`close`.

    A handler only notes the signal, so that it may interrupt anything: a collective, or the saving that an
    earlier signal led to, which a second signal therefore does not harm. To be made in the main thread.
    """

    def __init__(self, exit_duration_in_mins: float | None = None, started: float | None = None) -> None:
        """``started`` is the moment, on :func:`time.monotonic`'s clock, that the limit counts from."""
        self._signal = StopReason.NONE
        self._process = os.getpid()
        begin = time.monotonic() if started is None else started
        minutes = exit_duration_in_mins
        self._deadline = None if minutes is None else begin + minutes * _SECONDS_PER_MINUTE
        self._previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)
        }

    def requested(self, now: float | None = None) -> StopReason:
        """The reason for this process to stop; false as long as there is none.

        ``now`` is a moment on :func:`time.monotonic`'s clock.
        """
        if self._signal:
            return self._signal
        moment = time.monotonic() if now is None else now
        over = self._deadline is not None and moment >= self._deadline
        return StopReason.TIME_LIMIT if over else StopReason.NONE

    def close(self) -> None:
        """Give the signals back to the handlers that they had before."""
        while self._previous:
            number, handler = self._previous.popitem()
            # None stands for a handler that was not installed from Python and cannot be put back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A forked worker inherits the handler; it must still end when it is told to.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signal = max(self._signal, StopReason[signal.Signals(number).name])
