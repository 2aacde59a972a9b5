"""Which numbers of which matrix a shard holds, and which blocks of statistics they touch.

Shards are cut along rows or columns, blocks along the flattened matrix: a boundary may lie within a block. A
:class:`Run` is a part of a shard whose numbers lie evenly in one matrix; it keeps the statistics of every block that
it touches, in the order of its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

Tensor = torch.Tensor

NESTED_BLOCK = 256
"""How many blocks' magnitudes share one of the nested statistics."""


@dataclass(frozen=True)
class Piece:
    """Rows and columns of one Hugging Face matrix; a shard's pieces follow one below the other."""

    matrix: int
    """Index of the matrix."""
    rows: tuple[int, int]
    """First row, and the row after the last one."""
    columns: tuple[int, int]

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])


@dataclass(frozen=True)
class Run:
    """``count`` stretches of ``length`` numbers of a flattened matrix, which begin ``stride`` apart."""

    start: int
    """Where the first stretch begins in the matrix."""
    stride: int
    count: int
    length: int
    block_size: int
    place: int
    """Where the first number is in the shard."""
    first_statistic: int
    """Where its first block's statistic is among the shard's."""
    first_nested: int = 0
    """Where the nested statistic of its first block is among the shard's."""

    @classmethod
    def of(cls, piece: Piece, width: int, block_size: int, place: int, first_statistic: int) -> Run:
        """Of a matrix whose rows have ``width`` numbers."""
        first, last = piece.columns
        rows = piece.rows[1] - piece.rows[0]
        count, length = (1, rows * width) if last - first == width else (rows, last - first)
        start = piece.rows[0] * width + first
        return cls(start, width, count, length, block_size, place, first_statistic)

    @property
    def end(self) -> int:
        """Where the shard's next run begins."""
        return self.place + self.count * self.length

    @cached_property
    def blocks(self) -> int:
        """Statistics of each stretch: the most blocks that one of them touches."""
        phases = (
            (self.start + i * self.stride) % self.block_size for i in range(min(self.count, self.block_size))
        )
        return (max(phases) + self.length - 1) // self.block_size + 1

    @property
    def num_statistics(self) -> int:
        """Its statistics; where a stretch touches fewer blocks than the most, some are not used."""
        return self.count * self.blocks

    @property
    def first_nested_block(self) -> int:
        """Which of the matrix's nested statistics is the run's first."""
        return self.start // self.block_size // NESTED_BLOCK

    @property
    def num_nested(self) -> int:
        """How many nested statistics it keeps, from its first to its last block."""
        last = (self.start + (self.count - 1) * self.stride) // self.block_size + self.blocks - 1
        return last // NESTED_BLOCK - self.first_nested_block + 1

    @property
    def is_regular(self) -> bool:
        """Whether it consists of whole blocks: its statistics then are one for each ``block_size`` numbers."""
        return all(step % self.block_size == 0 for step in self._steps)

    @property
    def is_even(self) -> bool:
        """Whether its numbers begin and end between bytes, in the matrix and in the shard."""
        return all(step % 2 == 0 for step in (*self._steps, self.place))

    @property
    def _steps(self) -> tuple[int, ...]:
        return (self.start, self.length) if self.count == 1 else (self.start, self.length, self.stride)

    def block_indices(self, first: int, last: int, device: torch.device) -> Tensor:
        """Blocks of the matrix of its statistics ``first`` to ``last``, int64 ``[last - first]``."""
        index = torch.arange(first, last, device=device)
        if self.count == 1:
            return index.add_(self.start // self.block_size)
        stretch = index // self.blocks
        index.sub_(stretch * self.blocks)
        return index.add_(stretch.mul_(self.stride).add_(self.start).floor_divide_(self.block_size))

    def counts(self, first: int, last: int, device: torch.device) -> Tensor:
        """How many of the shard's numbers ``first`` to ``last`` each statistic scales, int64 ``[num_statistics]``."""
        index = torch.arange(self.count, device=device)
        starts, places = self.start + index * self.stride, self.place + index * self.length
        begins = (starts + (first - places).clamp(0, self.length)).unsqueeze(1)
        ends = (starts + (last - places).clamp(0, self.length)).unsqueeze(1)
        blocks = self.block_indices(0, self.num_statistics, device).view(self.count, -1) * self.block_size
        covered = torch.minimum(ends, blocks + self.block_size) - torch.maximum(begins, blocks)
        return covered.clamp_(min=0).view(-1)
