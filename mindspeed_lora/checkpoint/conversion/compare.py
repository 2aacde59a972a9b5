"""Comparing two sets of named tensors piece by piece, so that memory does not grow with their sizes.

Equal bits are equal, NaN included. Where bits differ, values are compared in float64: how many differ, by how much at
most, where. Values that are NaN on both sides are no difference of values; NaN on one side alone always is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

PIECE_BYTES = 32 << 20
"""Rows are read this many bytes at a time, from either side."""

_BLOCK_VALUES = 1 << 20
"""Values are compared this many at a time; each takes a few float64."""


class Tensors(Protocol):
    """Named tensors of one side, read by ranges of rows."""

    def names(self) -> list[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` of a tensor, contiguous."""


@dataclass
class Difference:
    """In what one tensor differs between the sides; None in fields that say nothing."""

    name: str
    only_in: str | None = None
    """``A`` or ``B``: the only side that has it."""
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    dtypes: tuple[torch.dtype, torch.dtype] | None = None
    num_values: int = 0
    """Number of values that differ."""
    num_bits: int = 0
    """Number of pieces of rows whose bits differ in one dtype."""
    num_nan: int = 0
    """Number of values that are NaN on one side alone; they are among ``num_values``."""
    largest: float = 0.0
    """The largest absolute difference; infinite where a value is so, or NaN, on one side."""
    magnitude: float = 0.0
    """The largest finite magnitude of either side."""
    position: tuple[int, ...] | None = None
    """Where the largest difference is."""

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest magnitude."""
        if self.largest == 0.0:
            return 0.0
        return self.largest / self.magnitude if self.magnitude else math.inf

    @property
    def kind(self) -> str:
        """``missing``, ``shape``, ``values``, ``dtype`` (equal values in another dtype) or ``bits`` (−0, NaN)."""
        if self.only_in is not None:
            return "missing"
        if self.shapes is not None:
            return "shape"
        if self.num_values:
            return "values"
        return "dtype" if self.dtypes is not None else "bits"

    def is_within(self, tolerance: float | None) -> bool:
        """Whether the difference still counts as equal."""
        if tolerance is None or self.kind in ("missing", "shape"):
            return False
        return self.num_nan == 0 and self.relative <= tolerance


def compare(one: Tensors, other: Tensors) -> Iterator[tuple[str, Difference | None]]:
    """Each tensor's name with its difference, None where it is bit-equal; in the order of the first side."""
    names, others = one.names(), other.names()
    known, others_known = set(names), set(others)
    for name in names:
        if name not in others_known:
            yield name, Difference(name, only_in="A")
        elif one.shape(name) != other.shape(name):
            yield name, Difference(name, shapes=(one.shape(name), other.shape(name)))
        else:
            yield name, compare_rows(one, other, name, one.shape(name)[0])
    for name in others:
        if name not in known:
            yield name, Difference(name, only_in="B")


def compare_rows(one: Tensors, other: Tensors, name: str, rows: int) -> Difference | None:
    """The difference in the first rows of a tensor that both sides have; None where they are bit-equal."""
    shape, dtypes = (rows, *one.shape(name)[1:]), (one.dtype(name), other.dtype(name))
    found = Difference(name, dtypes=dtypes if dtypes[0] != dtypes[1] else None)
    for start, stop in row_pieces(shape, max(dtype.itemsize for dtype in dtypes)):
        first, second = one.rows(name, start, stop), other.rows(name, start, stop)
        if found.dtypes is None and torch.equal(_bits(first), _bits(second)):
            continue
        found.num_bits += 1
        _compare_values(found, first, second, start)
    return found if found.num_bits or found.dtypes is not None else None


def row_pieces(shape: Sequence[int], itemsize: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are at most ``PIECE_BYTES`` each, but at least one row."""
    step = max(1, PIECE_BYTES // max(1, prod(shape[1:]) * itemsize))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _compare_values(found: Difference, first: torch.Tensor, second: torch.Tensor, start: int) -> None:
    """Add the differences of a piece of rows, the first of which is row ``start``."""
    width = prod(first.shape[1:])
    blocks = zip(first.reshape(-1).split(_BLOCK_VALUES), second.reshape(-1).split(_BLOCK_VALUES), strict=True)
    for number, (one, other) in enumerate(blocks):
        one, other = one.double(), other.double()
        for values in (one, other):
            finite = values[values.isfinite()]
            if finite.numel():
                found.magnitude = max(found.magnitude, float(finite.abs().max()))
        differs = (one != other) & ~(one.isnan() & other.isnan())
        count = int(differs.sum())
        if not count:
            continue
        found.num_values += count
        found.num_nan += int((one.isnan() != other.isnan()).sum())
        gap = torch.where(differs, (one - other).abs(), 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
        largest, at = gap.max(dim=0)
        if float(largest) > found.largest or found.position is None:
            found.largest = float(largest)
            row, column = divmod(number * _BLOCK_VALUES + int(at), width)
            found.position = (start + row, column) if len(first.shape) > 1 else (start + row,)
