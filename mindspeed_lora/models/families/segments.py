"""Which rows of which part a fused or sharded matrix holds, and how wanted ranges map onto them.

A *whole* (a fused matrix, an unsharded tensor) is an ordered list of :class:`Segment`: runs of consecutive
indices of its *parts* (the Hugging Face matrices that were fused, the shards of the TP ranks) along one axis.
Reading a range of the whole, building it, and splitting it are all walks over that list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

Range = tuple[int, int]


class Segment(NamedTuple):
    """Indices ``start`` to ``stop`` of part number ``part``; the next segment of the whole follows it."""

    part: int
    start: int
    stop: int


class Piece(NamedTuple):
    """Indices ``start`` to ``stop`` of part ``part`` belong at index ``at`` of what was asked for."""

    part: int
    start: int
    stop: int
    at: int


def pieces(segments: Sequence[Segment], ranges: Sequence[Range]) -> Iterator[Piece]:
    """Cut ``ranges`` of the whole along ``segments``, in the order of the ranges."""
    at = 0
    for start, stop in ranges:
        position = 0
        for segment in segments:
            length = segment.stop - segment.start
            first, last = max(start, position), min(stop, position + length)
            if first < last:
                offset = segment.start - position
                yield Piece(segment.part, first + offset, last + offset, at + first - start)
            position += length
        at += stop - start


def part_sizes(segments: Sequence[Segment]) -> tuple[int, ...]:
    """Size of each part along the segmented axis."""
    sizes: dict[int, int] = {}
    for part, _, stop in segments:
        sizes[part] = max(stop, sizes.get(part, 0))
    return tuple(sizes[part] for part in sorted(sizes))
