"""Which queries attend to which keys, as a list of rectangles that one fused kernel call each computes.

A row of a batch may hold several sub-rows that attention does not cross; with a sliding window w, position i
sees positions i − w + 1 … i; and under context parallelism a rank holds only chunks of a row. All three are
intersections of ranges. No rectangle is larger than what is attended to, but for half of a square on the
diagonal and the edges of a window.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache

from mindspeed_lora.parallel.context import Chunks

SubRows = tuple[tuple[int, ...], ...]
"""For each row the lengths of its sub-rows, in order."""
_BLOCK = 256
"""Queries of a tile where a window cuts the keys: a mask has this many rows."""


class Visible(Enum):
    """Which keys of a tile a query of it sees."""

    CAUSAL = "a square, each query its own key and those before it"
    FULL = "all"
    BAND = "those of its window: a mask"


@dataclass(frozen=True)
class Tile:
    """A range of queries over a range of keys, for a range of rows; indices into what is held."""

    rows: slice
    queries: slice
    keys: slice
    visible: Visible
    own: bool
    """Each query's own key is in it. These tiles hold every query once, and come before others of it."""
    shift: int = 0
    """Position of the first query minus position of the first key."""
    window: int | None = None
    """Of a :attr:`Visible.BAND`."""


@dataclass(frozen=True)
class _Piece:
    """Consecutive positions that are held one behind the other."""

    start: int
    position: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def end(self) -> int:
        return self.position + self.length

    def index(self, first: int, last: int) -> slice:
        """Where positions ``first`` … ``last`` − 1 lie."""
        return slice(self.start + first - self.position, self.start + last - self.position)


@lru_cache(maxsize=256)
def attention_tiles(
    batch_size: int, sub_rows: SubRows | None, queries: Chunks, keys: Chunks, window: int | None = None
) -> tuple[Tile, ...]:
    """The tiles of causal attention of the held queries over the held keys.

    Args:
        batch_size: rows b.
        sub_rows: of each of the b whole rows; None: each is one.
        queries: chunks of a row that the queries are.
        keys: chunks of a row that the keys are; the same as ``queries``, or none of them.
        window: of the sliding window.
    """
    own = queries == keys
    tiles: list[Tile] = []
    first_row = 0
    for lengths, rows in itertools.groupby(sub_rows or [()] * batch_size):
        last_row = first_row + len(list(rows))
        for first, last in _bounds(lengths, queries, keys):
            q, k = _pieces(queries, first, last), _pieces(keys, first, last)
            if q and k:
                cut = window is not None and q[-1].end - k[0].position > window
                found = _windowed(q, k, own, window) if cut and window is not None else _whole(q, k, own)
                tiles += (replace(tile, rows=slice(first_row, last_row)) for tile in found)
        first_row = last_row
    return tuple(tiles)


def _bounds(lengths: tuple[int, ...], queries: Chunks, keys: Chunks) -> Iterator[tuple[int, int]]:
    """First position and end of each sub-row."""
    if not lengths:
        yield 0, max(position + length for position, length in (*queries, *keys))
    stops = list(itertools.accumulate(lengths))
    yield from zip([0, *stops], stops, strict=False)


def _pieces(chunks: Chunks, first: int, last: int) -> list[_Piece]:
    """What is held of positions ``first`` … ``last`` − 1."""
    pieces: list[_Piece] = []
    start = 0
    for position, length in chunks:
        low, high = max(position, first), min(position + length, last)
        if low < high:
            piece = _Piece(start + low - position, low, high - low)
            if pieces and (pieces[-1].end, pieces[-1].stop) == (piece.position, piece.start):
                before = pieces.pop()
                piece = _Piece(before.start, before.position, before.length + piece.length)
            pieces.append(piece)
        start += length
    return pieces


def _whole(queries: list[_Piece], keys: list[_Piece], own: bool) -> Iterator[Tile]:
    """Of one sub-row without a window. Pieces of it that follow each other lie one behind the other.

    Chunks do not overlap, so that a piece of other keys comes wholly before a piece of queries or wholly after.
    """
    if own:
        held = slice(queries[0].start, queries[-1].stop)
        yield Tile(slice(0), held, held, Visible.CAUSAL, own=True)
        return
    by_last = itertools.groupby(queries, key=lambda piece: sum(k.position < piece.position for k in keys))
    for seen, group in by_last:
        pieces = list(group)
        if seen:
            where = slice(pieces[0].start, pieces[-1].stop), slice(keys[0].start, keys[seen - 1].stop)
            yield Tile(slice(0), *where, Visible.FULL, own=False)


def _windowed(queries: list[_Piece], keys: list[_Piece], own: bool, window: int) -> Iterator[Tile]:
    for piece in queries:
        for first, last in _blocks(piece, window if own else _BLOCK):
            if own:
                yield _own_tile(piece, first, last, window)
            for other in keys:
                if other.position < piece.position and other.end > first - window + 1:
                    yield _earlier_tile(piece, other, first, last, window)


def _blocks(piece: _Piece, size: int) -> Iterator[tuple[int, int]]:
    """Positions cut into blocks, the first of ``size``."""
    first, last = piece.position, min(piece.end, piece.position + size)
    while first < last:
        yield first, last
        first, last = last, min(piece.end, last + _BLOCK)


def _own_tile(piece: _Piece, first: int, last: int, window: int) -> Tile:
    start = max(piece.position, first - window + 1)
    where = piece.index(first, last), piece.index(start, last)
    if start == first and last - first <= window:
        return Tile(slice(0), *where, Visible.CAUSAL, own=True)
    return Tile(slice(0), *where, Visible.BAND, own=True, shift=first - start, window=window)


def _earlier_tile(piece: _Piece, other: _Piece, first: int, last: int, window: int) -> Tile:
    """Queries that see any of the keys before them; a query that sees none would have no softmax."""
    start = max(other.position, first - window + 1)
    last = min(last, other.end - 1 + window)
    where = piece.index(first, last), other.index(start, other.end)
    if last - 1 - start < window:
        return Tile(slice(0), *where, Visible.FULL, own=False)
    return Tile(slice(0), *where, Visible.BAND, own=False, shift=first - start, window=window)
