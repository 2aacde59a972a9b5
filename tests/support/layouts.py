"""Parallel layouts of a training job, all that up to four ranks allow, and a subset that covers every pair."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

RECOMPUTE = {
    "none": "",
    "selective": "--recompute-granularity selective",
    "uniform": "--recompute-granularity full --recompute-method uniform --recompute-num-layers",
    "block": "--recompute-granularity full --recompute-method block --recompute-num-layers",
}
"""What is recomputed → its flags, where a number of layers is left to add."""
LAYERS = 4
"""Of the models that are trained in these layouts."""


@dataclass(frozen=True, order=True)
class Layout:
    """How a job is cut over processes, and what it recomputes."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    recompute: str = "none"

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.tp * self.pp * self.dp

    @property
    def flags(self) -> list[str]:
        """The command-line flags."""
        words = ["--tensor-model-parallel-size", str(self.tp), "--pipeline-model-parallel-size", str(self.pp)]
        words += ["--sequence-parallel"] if self.sequence_parallel else []
        words += ["--use-distributed-optimizer"] if self.distributed_optimizer else []
        words += RECOMPUTE[self.recompute].split()
        if self.recompute in ("uniform", "block"):
            # A chunk of several layers where a stage has them; a block that leaves a layer out.
            layers = LAYERS // self.pp
            words.append(str(2 if self.recompute == "uniform" and layers > 1 else max(1, layers - 1)))
        return words

    def __str__(self) -> str:
        parts = [f"tp{self.tp}" + ("sp" if self.sequence_parallel else ""), f"pp{self.pp}"]
        parts.append(f"dp{self.dp}" + ("zero1" if self.distributed_optimizer else ""))
        return "-".join([*parts, self.recompute])


def all_layouts(max_ranks: int = 4) -> list[Layout]:
    """Every layout that ``max_ranks`` ranks allow; SP needs TP > 1, the distributed optimizer DP > 1."""
    sizes = [1, 2, 4]
    return [
        Layout(tp, pp, dp, sequence_parallel, distributed, recompute)
        for tp, pp, dp in itertools.product(sizes, sizes, sizes)
        if tp * pp * dp <= max_ranks
        for sequence_parallel in ([False, True] if tp > 1 else [False])
        for distributed in ([False, True] if dp > 1 else [False])
        for recompute in RECOMPUTE
    ]


def covering(layouts: Sequence[Layout]) -> list[Layout]:
    """A small subset in which every pair of values that occurs in ``layouts`` occurs too.

    The values of a layout are TP, PP, DP, SP, the distributed optimizer and recomputation. Greedy: the layout
    with most new pairs is taken, the first of equals.
    """
    missing = set().union(*map(pairs, layouts))
    chosen: list[Layout] = []
    while missing:
        best = max(layouts, key=lambda layout: len(pairs(layout) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return sorted(chosen)


def pairs(layout: Layout) -> set[frozenset[tuple[str, object]]]:
    """Every pair of two different values of a layout."""
    values: list[tuple[str, object]] = [
        ("tp", layout.tp),
        ("pp", layout.pp),
        ("dp", layout.dp),
        ("sequence_parallel", layout.sequence_parallel),
        ("distributed_optimizer", layout.distributed_optimizer),
        ("recompute", layout.recompute),
    ]
    return {frozenset(pair) for pair in itertools.combinations(values, 2)}
