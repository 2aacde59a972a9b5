"""Parallel layouts of a training job with experts: a layout, and how the experts are cut over its ranks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from tests.support.layouts import RECOMPUTE, Layout

DISPATCHERS = ("alltoall", "alltoall_seq", "allgather")
"""Of ``--moe-token-dispatcher-type``."""
OVERLAP = "--moe-alltoall-overlap-comm"


@dataclass(frozen=True)
class ExpertLayout:
    """A layout, and how the experts are cut."""

    layout: Layout
    ep: int = 1
    etp: int | None = None
    """Left out: TP."""
    dispatcher: str = DISPATCHERS[0]
    more: str = ""
    """Further flags."""

    @property
    def flags(self) -> list[str]:
        """The flags beside those of the layout."""
        words = ["--expert-model-parallel-size", str(self.ep), "--moe-grouped-gemm"]
        words += [] if self.etp is None else ["--expert-tensor-parallel-size", str(self.etp)]
        words += ["--moe-token-dispatcher-type", self.dispatcher]
        return words + self.more.split()

    def __str__(self) -> str:
        words = [f"ep{self.ep}", *([] if self.etp is None else [f"etp{self.etp}"]), str(self.layout)]
        words += [] if self.dispatcher == DISPATCHERS[0] else [self.dispatcher]
        return "-".join(words + [word.removeprefix("--") for word in self.more.split()])


def expert_layouts(max_ranks: int = 4) -> list[ExpertLayout]:
    """EP 1, 2, 4 × ETP 1, 2 × TP 1, 2, with and without SP, × PP 1, 2 × CP 1, 2, each on the fewest ranks.

    Under CP only those whose experts are cut. SP with CP, virtual stages, the distributed optimizer, attention under
    CP, recomputation and the dispatcher take turns.
    """
    found: list[ExpertLayout] = []
    for cp, pp, tp, ep, etp in itertools.product([1, 2], [1, 2], [1, 2], [1, 2, 4], [1, 2]):
        dp = max(1, ep * etp // (tp * cp))
        if tp * pp * dp * cp > max_ranks or (cp > 1 and ep * etp == 1):
            continue
        ways = [False, True] if tp > 1 else [False]
        for sequence_parallel in ways if cp == 1 else [ways[len(found) % len(ways)]]:
            turn = len(found)
            layout = Layout(
                tp=tp,
                pp=pp,
                dp=dp,
                cp=cp,
                sequence_parallel=sequence_parallel,
                distributed_optimizer=dp * cp > 1 and turn // 2 % 2 == 0,
                recompute=list(RECOMPUTE)[turn % len(RECOMPUTE)],
                vpp=1 + turn % 2 if pp > 1 else 1,
                attention=("ring", "ulysses")[turn % 2] if cp > 1 else "whole",
            )
            found.append(ExpertLayout(layout, ep, etp, DISPATCHERS[turn % len(DISPATCHERS)]))
    return found
