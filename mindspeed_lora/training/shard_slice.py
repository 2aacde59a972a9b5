"""What part of a whole tensor a rank owns, and what two such parts have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from mindspeed_lora.checkpoint.loading.local_parameters import LocalParameter, is_vocabulary


@dataclass(frozen=True)
class ShardSlice:
    """Elements ``[start, stop)`` of a flattened TP shard, and what the shard is of the whole tensor."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    axis: int | None
    ranges: tuple[tuple[int, int], ...]
    start: int
    stop: int

    @classmethod
    def of(cls, parameter: LocalParameter, start: int, stop: int) -> ShardSlice:
        """The slice of a parameter of this rank that is one canonical tensor."""
        ((piece, _, _),) = cls.all_of(parameter, start, stop)
        return piece

    @classmethod
    def all_of(
        cls, parameter: LocalParameter, start: int, stop: int
    ) -> Iterator[tuple[ShardSlice, int, int]]:
        """Elements ``[start, stop)`` of a flattened parameter by canonical tensor, and where each stands in them."""
        size = parameter.param.numel() // len(parameter.members)
        for number, name in enumerate(parameter.members):
            low, high = max(start, number * size), min(stop, (number + 1) * size)
            if low < high:
                first = number * size
                piece = cls(
                    name, parameter.shape, parameter.axis, parameter.ranges, low - first, high - first
                )
                yield piece, low - start, high - start

    def is_of(self, other: ShardSlice) -> bool:
        """Whether both are of the same tensor; the vocabulary may be padded to another number of rows."""
        if self.name == other.name and is_vocabulary(self.name):
            return self.shape[1:] == other.shape[1:]
        return self.name == other.name and self.shape == other.shape

    def runs(self) -> Runs:
        """The slice as stretches of the flattened whole tensor."""
        axis = 0 if self.axis is None else self.axis
        ranges = ((0, self.shape[0]),) if self.axis is None else self.ranges
        inner = prod(self.shape[axis + 1 :])
        rows = np.arange(prod(self.shape[:axis])).reshape(-1, 1) * self.shape[axis]
        bounds = np.array(ranges, dtype=np.int64)
        starts = ((rows + bounds[:, 0]) * inner).reshape(-1)
        stops = ((rows + bounds[:, 1]) * inner).reshape(-1)
        return Runs(starts, stops).cut(self.start, self.stop)

    def index(self) -> torch.Tensor:
        """Positions of the slice's elements in the flattened whole tensor, int64."""
        runs = self.runs()
        first = np.repeat(runs.starts - runs.offsets, runs.stops - runs.starts)
        return torch.from_numpy(first + np.arange(self.stop - self.start))

    def take(self, other: ShardSlice, values: torch.Tensor, out: torch.Tensor, known: torch.Tensor) -> None:
        """Copies what another slice of the same tensor holds of this one, and marks it in ``known``.

        Args:
            values: the other slice's elements, flat.
            out, known: of this slice, flat; rows that only one of the two has pad the vocabulary: they are zero.
        """
        mine, theirs = self.runs(), other.runs()
        for here, there, length in mine.common(theirs):
            out[here : here + length] = values[there : there + length]
            known[here : here + length] = True
        known[mine.count_below(prod(other.shape)) :] = True


@dataclass(frozen=True)
class Runs:
    """Ascending stretches ``[starts, stops)`` of a flattened tensor, int64; together they are a slice of it."""

    starts: np.ndarray
    stops: np.ndarray

    @property
    def offsets(self) -> np.ndarray:
        """Where each run begins within the slice."""
        lengths = self.stops - self.starts
        offsets: np.ndarray = np.cumsum(lengths) - lengths
        return offsets

    def cut(self, start: int, stop: int) -> Runs:
        """Elements ``[start, stop)`` of the slice."""
        starts = self.starts + np.clip(start - self.offsets, 0, None)
        stops = np.minimum(self.stops, self.starts + np.clip(stop - self.offsets, 0, None))
        left = starts < stops
        return Runs(starts[left], stops[left])

    def common(self, other: Runs) -> list[tuple[int, int, int]]:
        """What both hold: where it begins in this slice and in the other one, and its length."""
        first = np.searchsorted(other.stops, self.starts, side="right")
        last = np.searchsorted(other.starts, self.stops, side="left")
        counts = np.maximum(last - first, 0)
        here = np.repeat(np.arange(len(self.starts)), counts)
        there = (
            np.arange(len(here)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
        )
        starts = np.maximum(self.starts[here], other.starts[there])
        stops = np.minimum(self.stops[here], other.stops[there])
        return list(
            zip(
                (self.offsets[here] + starts - self.starts[here]).tolist(),
                (other.offsets[there] + starts - other.starts[there]).tolist(),
                (stops - starts).tolist(),
                strict=True,
            )
        )

    def count_below(self, position: int) -> int:
        """How many elements of the slice stand before a position of the whole tensor."""
        return int(np.clip(position - self.starts, 0, self.stops - self.starts).sum())
