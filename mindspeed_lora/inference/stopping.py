"""Where an answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StopRule:
    """Sequences of tokens that end an answer; end tokens are sequences of one."""

    sequences: tuple[tuple[int, ...], ...]

    def ending(self, tokens: Sequence[int]) -> int:
        """How many tokens at the end of an answer are the stop; 0 where it goes on."""
        found = (len(stop) for stop in self.sequences if stop and tuple(tokens[-len(stop) :]) == stop)
        return max(found, default=0)

    def held_back(self, tokens: Sequence[int]) -> int:
        """How many tokens at the end may turn out to begin a stop sequence, and are not shown yet."""
        longest = max((len(stop) for stop in self.sequences), default=0)
        for length in range(min(longest - 1, len(tokens)), 0, -1):
            tail = tuple(tokens[-length:])
            if any(len(stop) > length and stop[:length] == tail for stop in self.sequences):
                return length
        return 0
