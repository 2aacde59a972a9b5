"""Which rows are put together to rows of at most a fixed length: best fit decreasing, and even bins.

A bin is one packed row. Both ways are deterministic and depend on the lengths alone.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Numbers = Sequence[int] | np.ndarray[Any, Any]


@dataclass(frozen=True)
class Packing:
    """Rows dealt out to bins: bins in the order of their first row, the rows of a bin in input order."""

    rows: np.ndarray[Any, Any]
    """int64 ``[n]``: the numbers of the rows, bin after bin."""
    bounds: np.ndarray[Any, Any]
    """int64 ``[bins + 1]``: bin j holds ``rows[bounds[j]:bounds[j + 1]]``."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[np.ndarray[Any, Any]]:
        """The row numbers of each bin."""
        for start, stop in zip(self.bounds[:-1].tolist(), self.bounds[1:].tolist(), strict=True):
            yield self.rows[start:stop]

    @classmethod
    def of(cls, bin_of_row: np.ndarray[Any, Any]) -> Packing:
        """From the bin of each row, int64 ``[n]``, whatever the bins are numbered by."""
        _, first_rows, bins = np.unique(bin_of_row, return_index=True, return_inverse=True)
        # Numbered by their first rows, so that a stable sort by bin keeps the order of the input twice over.
        first_row_of_bin = first_rows[bins]
        rows = np.argsort(first_row_of_bin, kind="stable")
        starts = np.flatnonzero(np.diff(first_row_of_bin[rows], prepend=-1))
        return cls(rows, np.append(starts, len(rows)))


def best_fit_decreasing(lengths: Numbers, capacity: int) -> Packing:
    """Deals out rows, the longest first, each to the bin that it leaves the least room in.

    ``lengths`` ``[n]`` are from 1 to ``capacity``. Rows of one length are placed together: the bin with the least
    room r that is enough takes r // length of them before the next bin has its turn, so that the work grows with
    the number of different lengths and rooms.
    """
    sizes = _checked(lengths, capacity)
    order = np.argsort(-sizes, kind="stable")
    values, counts = np.unique(sizes, return_counts=True)
    bins = _OpenBins(capacity)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        bins.place(length, count)
    bin_of_row = np.empty(len(sizes), dtype=np.int64)
    bin_of_row[order] = np.repeat(bins.placed, bins.placed_counts) if len(sizes) else 0
    return Packing.of(bin_of_row)


class _OpenBins:
    """Bins by the room that they have left."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.placed: list[int] = []
        """Bins in the order in which they took rows …"""
        self.placed_counts: list[int] = []
        """… and how many each of them took."""
        self._by_room: dict[int, list[int]] = {}
        self._rooms: list[int] = []
        """Rooms that some bin has, ascending."""
        self._num_bins = 0

    def place(self, length: int, count: int) -> None:
        """Put ``count`` rows of one length into the tightest bins, then into new ones."""
        while count:
            at = bisect_left(self._rooms, length)
            if at == len(self._rooms):
                self._open(-(-count // (self.capacity // length)))
                continue
            room = self._rooms[at]
            each = min(room // length, count)
            waiting = self._by_room[room]
            chosen = waiting[-(count // each) :]
            del waiting[-len(chosen) :]
            if not waiting:
                del self._by_room[room], self._rooms[at]
            self._return(chosen, room - each * length)
            self.placed += chosen
            self.placed_counts += [each] * len(chosen)
            count -= each * len(chosen)

    def _open(self, number: int) -> None:
        # The last of a room is taken first: newest first in the list, so that bins fill in the order of their age.
        self._return(list(range(self._num_bins + number - 1, self._num_bins - 1, -1)), self.capacity)
        self._num_bins += number

    def _return(self, bins: list[int], room: int) -> None:
        if room == 0:
            return
        if room in self._by_room:
            self._by_room[room] += bins
        else:
            self._by_room[room] = bins
            insort(self._rooms, room)


def even_bins(lengths: Numbers, capacity: int, num_bins: int) -> Packing | None:
    """Deals out rows to at most ``num_bins`` bins of about the same fill, or None where they do not fit so.

    The longest row first, each into the emptiest bin.
    """
    sizes = _checked(lengths, capacity)
    heap = [(0, number) for number in range(num_bins)]
    bin_of_row = np.empty(len(sizes), dtype=np.int64)
    for row in np.argsort(-sizes, kind="stable").tolist():
        filled, number = heap[0]
        filled += int(sizes[row])
        if filled > capacity:
            return None
        heapq.heapreplace(heap, (filled, number))
        bin_of_row[row] = number
    return Packing.of(bin_of_row)


def _checked(lengths: Numbers, capacity: int) -> np.ndarray[Any, Any]:
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and not 1 <= int(sizes.min()) <= int(sizes.max()) <= capacity:
        raise ValueError(
            f"packing: lengths from {int(sizes.min())} to {int(sizes.max())}; expected 1 to {capacity}"
        )
    return sizes
