"""How the samples of one global batch are dealt out: to data-parallel ranks, micro-batches and rows.

Which samples make up a global batch is never decided here, and the loss is normalised over all of its tokens, so
that no way of dealing changes a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol

from mindspeed_lora.data.batch import Batch, NumberedSample, Padding, collate
from mindspeed_lora.data.packing import Packing, best_fit_decreasing, even_bins
from mindspeed_lora.data.sample import Sample

Fetch = Callable[[int], Sample]
"""The sample of a number of the run or evaluation."""


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Sizes of a global batch, and which data-parallel rank is meant."""

    micro_batch_size: int
    """Rows of a micro-batch."""
    global_batch_size: int
    """Samples of a global batch."""
    dp_rank: int = 0
    dp_size: int = 1
    micro_batch_multiple: int = 1
    """The number of micro-batches of a rank is a multiple of this."""

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.micro_batch_size * self.dp_size):
            raise ValueError(
                f"global batch {self.global_batch_size} is not divisible by micro-batch "
                f"{self.micro_batch_size} × data-parallel size {self.dp_size}"
            )

    def num_micro_batches(self, num_rows: int) -> int:
        """Micro-batches of each rank, as many on all and at least one, for ``num_rows`` rows."""
        needed = max(-(-num_rows // (self.micro_batch_size * self.dp_size)), 1)
        return -(-needed // self.micro_batch_multiple) * self.micro_batch_multiple


class Dealing(Protocol):
    """One way of dealing out."""

    shape: BatchShape

    def micro_batches(self, numbers: Sequence[int], fetch: Fetch) -> list[Batch]:
        """This rank's micro-batches of the global batch of the samples ``numbers``."""
        ...


class OneSampleARow:
    """Sample j of a global batch goes to micro-batch ``j // (mbs · dp)`` of rank ``(j // mbs) % dp``."""

    def __init__(self, shape: BatchShape, padding: Padding) -> None:
        self.shape = shape
        self.padding = padding

    def micro_batches(self, numbers: Sequence[int], fetch: Fetch) -> list[Batch]:
        """This rank's micro-batches of the global batch of the samples ``numbers``."""
        shape, batches = self.shape, []
        for micro_batch in range(shape.num_micro_batches(len(numbers))):
            first = (micro_batch * shape.dp_size + shape.dp_rank) * shape.micro_batch_size
            chosen = numbers[first : first + shape.micro_batch_size]
            rows = [[NumberedSample(number, fetch(number))] for number in chosen]
            batches.append(collate(rows, self.padding, _fill_to(shape, self.padding)))
        return batches


class PackedRows:
    """The samples are packed to as few rows of at most ``capacity`` tokens as best fit decreasing finds.

    Where rows are left over, since every rank has as many micro-batches, and where it works without them, all rows
    are filled evenly instead. Every rank plans for all and takes its own rows, which come to about as many tokens
    as those of any other.
    """

    def __init__(self, shape: BatchShape, padding: Padding, capacity: int) -> None:
        self.shape = shape
        self.padding = padding
        self.capacity = capacity

    def micro_batches(self, numbers: Sequence[int], fetch: Fetch) -> list[Batch]:
        """This rank's micro-batches of the global batch of the samples ``numbers``."""
        shape = self.shape
        entries = [entry for number in numbers if len(entry := NumberedSample(number, fetch(number)))]
        packing = self._pack([len(entry) for entry in entries])
        packed = [[entries[index] for index in bin_] for bin_ in packing]
        count = shape.num_micro_batches(len(packed))
        size = shape.micro_batch_size
        shares = _shares([sum(map(len, row)) for row in packed], shape.dp_size, count * size)
        rows = [packed[index] for index in shares[shape.dp_rank]]
        fill_to = _fill_to(shape, self.padding)
        return [
            collate(rows[first : first + size], self.padding, fill_to)
            for first in range(0, count * size, size)
        ]

    def _pack(self, lengths: Sequence[int]) -> Packing:
        fewest = best_fit_decreasing(lengths, self.capacity)
        shape = self.shape
        rows = shape.num_micro_batches(len(fewest)) * shape.micro_batch_size * shape.dp_size
        even = even_bins(lengths, self.capacity, rows)
        return fewest if even is None else even


def _shares(sizes: Sequence[int], ranks: int, most: int) -> list[list[int]]:
    """The rows of each rank, at most ``most``, the longest first: each goes to the rank with the fewest tokens."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0, rank) for rank in range(ranks)]
    for row in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        tokens, rank = heappop(heap)
        shares[rank].append(row)
        if len(shares[rank]) < most:
            heappush(heap, (tokens + sizes[row], rank))
    return shares


def _fill_to(shape: BatchShape, padding: Padding) -> int:
    """A fixed length keeps the number of rows fixed too, so that all shapes are the same."""
    return shape.micro_batch_size if padding.seq_length is not None else 0
