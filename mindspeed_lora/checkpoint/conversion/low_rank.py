"""Regions of ``(B·A)·s`` of one Hugging Face matrix, with the bits that the whole product has.

A matrix product rounds an element otherwise where its row or column falls into another tile of the kernel (a lone
row, a short rest). Regions whose edges are multiples of 16, and that are no smaller than that, were found to have the
bits of the whole for all shapes tried; regions are widened to multiples of 256 here, a short rest goes with its
neighbour, and what was not asked for is left out of the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mindspeed_lora.models.families.segments import Piece, Range, Segment, pieces

ALIGNMENT = 256
BLOCK_COLUMNS = 1024
"""Most columns of a block."""
BLOCK_BYTES = 1 << 20
"""Most bytes of float32 that a block of more than 256 rows takes: what a core's own cache holds through all steps."""


class LowRankProduct:
    """``(B·A)·s`` of one matrix.

    Args:
        lora_a: ``[r, in]``.
        lora_b: ``[out, r]``.
        scaling: ``s``.
    """

    def __init__(self, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> None:
        self.lora_a = lora_a.float()
        self.lora_b = lora_b.float()
        self.scaling = scaling

    def region(self, rows: Range, columns: Range) -> torch.Tensor:
        """The values of these rows and columns, ``[rows, columns]``, float32."""
        low, high = _widened(rows, self.lora_b.shape[0])
        left, right = _widened(columns, self.lora_a.shape[1])
        product = self.lora_b[low:high] @ self.lora_a[:, left:right]
        inside = product[rows[0] - low : rows[1] - low, columns[0] - left : columns[1] - left]
        return inside.mul_(self.scaling)


def _widened(wanted: Range, size: int) -> Range:
    """A range with edges that keep the product's bits."""
    start = wanted[0] // ALIGNMENT * ALIGNMENT
    stop = min(size, -(-wanted[1] // ALIGNMENT) * ALIGNMENT)
    if size - stop < ALIGNMENT:
        stop = size
    if stop - start < ALIGNMENT:
        start = max(0, start - ALIGNMENT)
    return start, stop


@dataclass(frozen=True)
class Block:
    """A block of one of the matrices that a canonical tensor is made of, and where its rows are in what was read."""

    part: int
    """Number of the matrix."""
    rows: Range
    """Of the matrix."""
    columns: Range
    runs: tuple[Piece, ...]
    """Rows of the matrix that follow each other in what was read too."""
    at_column: int

    def window(self, run: Piece, tensor: torch.Tensor) -> torch.Tensor:
        """The part of what was read that one run is."""
        rows = tensor.narrow(0, run.at, run.stop - run.start)
        return rows.narrow(1, self.at_column, self.columns[1] - self.columns[0])


def blocks(segments: Sequence[Segment], wanted: Sequence[Sequence[Range]]) -> Iterator[Block]:
    """Cut wanted ranges of rows and columns of a canonical matrix into blocks, one matrix after the other."""
    runs: dict[int, list[Piece]] = {}
    for piece in pieces(segments, wanted[0]):
        runs.setdefault(piece.part, []).append(piece)
    for part, own in runs.items():
        first, last = min(run.start for run in own), max(run.stop for run in own)
        at_column = 0
        for left, right in wanted[1]:
            height = BLOCK_BYTES // (4 * min(right - left, BLOCK_COLUMNS)) // ALIGNMENT * ALIGNMENT
            for rows in _cut((first, last), max(ALIGNMENT, height)):
                inside = tuple(_clipped(own, rows))
                for columns in _cut((left, right), BLOCK_COLUMNS) if inside else ():
                    yield Block(part, rows, columns, inside, at_column + columns[0] - left)
            at_column += right - left


def _cut(whole: Range, step: int) -> Iterator[Range]:
    """A range in pieces that begin and end at multiples of ``step``."""
    for start in range(whole[0] // step * step, whole[1], step):
        yield max(whole[0], start), min(whole[1], start + step)


def _clipped(runs: Sequence[Piece], rows: Range) -> Iterator[Piece]:
    for run in runs:
        start, stop = max(run.start, rows[0]), min(run.stop, rows[1])
        if start < stop:
            yield Piece(run.part, start, stop, run.at + start - run.start)
