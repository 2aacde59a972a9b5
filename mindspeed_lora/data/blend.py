"""Several data sets as one: in what order a run takes its samples from them.

Megatron-core's rule, sample by sample: among the parts, the one whose number of samples so far lags behind its share
of all the most is next, the first of them where several do. A part's own samples are taken in its own order, epoch
after epoch. With weights the shares are these, for ever. Without, they are the parts' sizes, and an epoch of the blend
takes every sample of every part once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from mindspeed_lora.data.sample import Sample
from mindspeed_lora.data.sampling import SampleOrder

_BLOCK = 4096
"""Samples between two noted counts."""


class Part(Protocol):
    """A data set of a blend."""

    @property
    def longest(self) -> int:
        """Bound on the length of a sample."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


AnyPart = TypeVar("AnyPart", bound=Part)


class BlendedDataset(Generic[AnyPart]):
    """The samples of all parts, those of the first one first."""

    def __init__(self, parts: Sequence[AnyPart], weights: Sequence[float] | None = None) -> None:
        """``weights`` are positive, of any sum; None: by the sizes."""
        self.parts = tuple(parts)
        self.weights = None if weights is None else tuple(weights)
        self.starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def longest(self) -> int:
        """Bound on the length of a sample."""
        return max(part.longest for part in self.parts)

    def __getitem__(self, index: int) -> Sample:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part][index - int(self.starts[part])]


class BlendOrder:
    """Maps sample i of a run to a sample of a :class:`BlendedDataset`.

    Any sample can be asked for: the position in the data is the number of consumed samples alone.
    """

    def __init__(self, dataset: BlendedDataset[Any], seed: int = 1234, shuffle: bool = True) -> None:
        sizes = [len(part) for part in dataset.parts]
        self._starts = dataset.starts
        self._orders = [SampleOrder(size, seed, shuffle) for size in sizes]
        self._sizes = sizes
        self._epoch: int | None = None
        if dataset.weights is None:
            self._epoch = len(dataset)
            self._turns = _Turns(_by_sizes(sizes))
        else:
            self._turns = _Turns(_by_weights(dataset.weights))

    def part_and_number(self, sample: int) -> tuple[int, int]:
        """The part of sample ``sample`` ≥ 0 of the run, and the how manieth of the part it is, counted from 0."""
        if self._epoch is None:
            return self._turns[sample]
        epoch, position = divmod(sample, self._epoch)
        part, number = self._turns[position]
        return part, number + epoch * self._sizes[part]

    def order(self, sample: int) -> int:
        """The index in the blended data set of sample ``sample`` ≥ 0 of the run."""
        part, number = self.part_and_number(sample)
        return int(self._starts[part]) + self._orders[part].order(number)


class _Turns:
    """Whose turn it is at any sample, and for the how manieth time; computed as far as anybody asked."""

    def __init__(self, turns: Iterator[tuple[int, list[int]]]) -> None:
        self._turns = turns
        self._parts = array("H")
        self._counts: list[list[int]] = []
        """How often each part has had its turn, at every ``_BLOCK``-th sample."""

    def __getitem__(self, sample: int) -> tuple[int, int]:
        while len(self._parts) <= sample:
            self._extend()
        block = sample // _BLOCK
        part = self._parts[sample]
        number = self._counts[block][part] + self._parts[block * _BLOCK : sample].count(part)
        return part, number

    def _extend(self) -> None:
        """One block more, or what is left."""
        for number, (part, counts) in enumerate(self._turns):
            if number == 0:
                self._counts.append(list(counts))
            self._parts.append(part)
            if number + 1 == _BLOCK:
                return


def _by_weights(weights: Sequence[float]) -> Iterator[tuple[int, list[int]]]:
    """The part of each sample without end, and how often each had its turn before it."""
    shares = (np.asarray(weights, dtype=np.float64) / np.sum(weights, dtype=np.float64)).tolist()
    counts = [0] * len(shares)
    sample = 0
    while True:
        part = _furthest_behind(range(len(shares)), shares, counts, sample)
        yield part, counts
        counts[part] += 1
        sample += 1


def _by_sizes(sizes: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """The part of each sample of one epoch, each part as often as it has samples."""
    total = sum(sizes)
    shares = [size / total for size in sizes]
    counts = [0] * len(sizes)
    unspent = [part for part, size in enumerate(sizes) if size]
    for sample in range(total):
        part = _furthest_behind(unspent, shares, counts, sample)
        yield part, counts
        counts[part] += 1
        if counts[part] == sizes[part]:
            unspent.remove(part)


def _furthest_behind(
    parts: Iterable[int], shares: Sequence[float], counts: Sequence[int], sample: int
) -> int:
    so_far = float(max(sample, 1))
    return max(parts, key=lambda part: shares[part] * so_far - counts[part])
