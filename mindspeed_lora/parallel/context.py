"""Context parallelism: which positions of a row a rank holds, and with whom it computes attention.

Ranks are arranged as rings of Ulysses groups. Each place in the ring holds the chunks i and 2r − 1 − i of the 2r
equal chunks that a row is cut into, so that causal attention is as much work for each; the u ranks of a Ulysses
group share what its place holds, in order. Ulysses alone is a ring of one place, the ring alone has groups of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from mindspeed_lora.config.parallel import ParallelConfig

Chunks = tuple[tuple[int, int], ...]
"""First position and number of positions of each of the chunks of a row that are held, in order."""


@dataclass(frozen=True, kw_only=True)
class ContextParallel:
    """A rank's place."""

    ulysses_rank: int = 0
    ulysses_size: int = 1
    ring_rank: int = 0
    ring_size: int = 1
    ulysses_group: dist.ProcessGroup | None = None
    """The ranks that share a place, in order; None at size 1."""
    ring_group: dist.ProcessGroup | None = None
    """The places, in order; None at size 1."""

    @property
    def size(self) -> int:
        """Ranks that share a row."""
        return self.ulysses_size * self.ring_size

    def chunks(self, num_positions: int, ring_rank: int | None = None) -> Chunks:
        """What a place of the ring (left out: this rank's) holds of a row, whose length 2r divides."""
        if self.ring_size == 1:
            return ((0, num_positions),)
        place, length = (
            self.ring_rank if ring_rank is None else ring_rank,
            num_positions // (2 * self.ring_size),
        )
        return ((place * length, length), ((2 * self.ring_size - 1 - place) * length, length))

    def positions(self, num_positions: int) -> torch.Tensor:
        """The positions of a row that this rank holds, in order, int64 ``[s / (u · r)]``."""
        assert num_positions % self.multiple == 0, f"{num_positions} positions over {self.size} ranks"
        held = torch.cat([torch.arange(first, first + n) for first, n in self.chunks(num_positions)])
        return held.chunk(self.ulysses_size)[self.ulysses_rank]

    @property
    def multiple(self) -> int:
        """What the length of a row must be a multiple of."""
        return 1 if self.size == 1 else 2 * self.size


def context_parallel(parallel: ParallelConfig, cp_group: dist.ProcessGroup) -> ContextParallel:
    """This rank's place; every rank of the job must call it."""
    ulysses_size, ring_size = parallel.context_degrees
    rank = dist.get_rank(cp_group)
    ring_rank, ulysses_rank = divmod(rank, ulysses_size)
    ulysses_group, ring_group = (cp_group if size > 1 else None for size in (ulysses_size, ring_size))
    if ulysses_size > 1 and ring_size > 1:
        ulysses_group, ring_group = _hybrid_groups(cp_group, ulysses_size)
    return ContextParallel(
        ulysses_rank=ulysses_rank,
        ulysses_size=ulysses_size,
        ring_rank=ring_rank,
        ring_size=ring_size,
        ulysses_group=ulysses_group,
        ring_group=ring_group,
    )


def _hybrid_groups(
    cp_group: dist.ProcessGroup, ulysses_size: int
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Ulysses groups of neighbours, and rings over these; all ranks make all groups, in the same order."""
    every: list[list[int] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, dist.get_process_group_ranks(cp_group))
    of_rows = sorted({tuple(ranks) for ranks in every if ranks is not None})
    neighbours = [list(r[i : i + ulysses_size]) for r in of_rows for i in range(0, len(r), ulysses_size)]
    rings = [list(r[i::ulysses_size]) for r in of_rows for i in range(ulysses_size)]
    ulysses_group, _ = dist.new_subgroups_by_enumeration(neighbours)
    ring_group, _ = dist.new_subgroups_by_enumeration(rings)
    return ulysses_group, ring_group
