"""Which schedule a linear runs."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from mindspeed_lora.parallel.overlap import WHOLE


class Family(enum.Enum):
    """How an adapter's products and collectives are ordered."""

    UNFUSED = "unfused"
    ONE_COLLECTIVE = "one-collective"
    OVERLAPPED = "overlapped"


@dataclass(frozen=True)
class SchedulePlan:
    """The schedule of one linear."""

    family: Family
    merge_from: int | None = None
    """From so many tokens on, ``W + s · B A`` is formed once; None: the side branch always runs by itself."""
    chunks: int = WHOLE
    """In which one collective travels; 0: nothing is computed before its end."""

    def merges(self, num_tokens: int) -> bool:
        """Whether a micro-batch of so many tokens goes through the merged weight, where nothing is dropped."""
        return self.merge_from is not None and num_tokens >= self.merge_from

    def is_partial(self, sequence_parallel: bool) -> bool:
        """Whether the replicated factor's gradient is a partial sum over TP, to be summed at the step.

        The r-wide all-reduces of the other families complete it where every rank sees all tokens.
        """
        return sequence_parallel or self.family is Family.ONE_COLLECTIVE

    def __str__(self) -> str:
        words = [self.family.value]
        if self.family is not Family.UNFUSED:
            words.append(
                {None: "split", 0: "merge"}.get(self.merge_from, f"merge from {self.merge_from} tokens")
            )
        if self.family is Family.ONE_COLLECTIVE:
            words.append(
                f"{self.chunks} chunks" if self.chunks > 1 else "own rows first" if self.chunks else "whole"
            )
        return ", ".join(words)


UNFUSED = SchedulePlan(Family.UNFUSED)
