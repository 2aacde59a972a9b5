"""The tiles of any rows, chunks and window hold every visible pair once and no other."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_lora.models.attention_tiles import Chunks, SubRows, Tile, Visible, attention_tiles


def seen_by(tiles: tuple[Tile, ...], shape: tuple[int, int, int]) -> torch.Tensor:
    """``[b, s, t]``: in how many tiles a query sees a key."""
    count = torch.zeros(shape, dtype=torch.int64)
    for tile in tiles:
        queries, keys = tile.queries.stop - tile.queries.start, tile.keys.stop - tile.keys.start
        distance = torch.arange(queries).unsqueeze(1) + tile.shift - torch.arange(keys)
        if tile.visible is Visible.FULL:
            seen = torch.ones(queries, keys, dtype=torch.bool)
        elif tile.visible is Visible.CAUSAL:
            assert queries == keys
            seen = torch.ones(queries, keys, dtype=torch.bool).tril()
        else:
            assert tile.window is not None
            seen = (distance >= 0) & (distance < tile.window)
        assert seen.any(dim=1).all(), "a query of a tile sees none of its keys"
        count[tile.rows, tile.queries, tile.keys] += seen
    return count


def visible(sub_rows: SubRows, queries: Chunks, keys: Chunks, window: int | None) -> torch.Tensor:
    """``[b, s, t]``, pair by pair."""
    positions = [torch.cat([torch.arange(p, p + n) for p, n in chunks]) for chunks in (queries, keys)]
    pairs = []
    for lengths in sub_rows:
        part = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        q, k = positions
        seen = (part[q].unsqueeze(1) == part[k]) & (k <= q.unsqueeze(1))
        pairs.append(seen if window is None else seen & (k > q.unsqueeze(1) - window))
    return torch.stack(pairs)


def zigzag(rank: int, size: int, chunk: int) -> Chunks:
    return ((rank * chunk, chunk), ((2 * size - 1 - rank) * chunk, chunk))


def chunk_pairs(size: int, chunk: int) -> list[tuple[Chunks, Chunks]]:
    held = [zigzag(rank, size, chunk) for rank in range(size)]
    return [(queries, keys) for queries in held for keys in held]


@st.composite
def packed_rows(draw: st.DrawFn, length: int) -> SubRows:
    rows = draw(st.integers(1, 3))
    return tuple(tuple(draw(splits(length))) for _ in range(rows))


@st.composite
def splits(draw: st.DrawFn, length: int) -> list[int]:
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=4)))
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, length], strict=True)]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), size=st.integers(1, 4), chunk=st.integers(1, 5), window=st.integers(1, 12) | st.none())
def test_every_visible_pair_is_in_one_tile(
    data: st.DataObject, size: int, chunk: int, window: int | None
) -> None:
    sub_rows = data.draw(packed_rows(2 * size * chunk))
    for queries, keys in chunk_pairs(size, chunk):
        tiles = attention_tiles(len(sub_rows), sub_rows, queries, keys, window)
        count = seen_by(tiles, (len(sub_rows), 2 * chunk, 2 * chunk))
        assert torch.equal(count, visible(sub_rows, queries, keys, window).long())
        check_own(tiles, queries == keys, (len(sub_rows), 2 * chunk))


def check_own(tiles: tuple[Tile, ...], own: bool, shape: tuple[int, int]) -> None:
    """Own tiles hold every query once, before any other tile of it."""
    written = torch.zeros(shape, dtype=torch.int64)
    for tile in tiles:
        here = written[tile.rows, tile.queries]
        assert tile.own == own or (own and bool((here == 1).all()))
        here += tile.own
    assert bool((written == own).all())


def test_blocks_of_a_long_windowed_row() -> None:
    chunks = ((0, 1400),)
    tiles = attention_tiles(1, None, chunks, chunks, 300)
    assert torch.equal(seen_by(tiles, (1, 1400, 1400)), visible(((1400,),), chunks, chunks, 300).long())
    largest = max((t.queries.stop - t.queries.start) * (t.keys.stop - t.keys.start) for t in tiles)
    assert largest <= 300 * 600


def test_rows_that_are_whole_are_one_tile() -> None:
    chunks = ((0, 8), (8, 8))
    (tile,) = attention_tiles(4, None, chunks, chunks)
    assert (tile.rows, tile.queries, tile.keys) == (slice(0, 4), slice(0, 16), slice(0, 16))
    assert tile.visible is Visible.CAUSAL


def test_packed_rows_are_one_square_a_sub_row() -> None:
    chunks = ((0, 10),)
    tiles = attention_tiles(3, ((4, 6), (4, 6), (10,)), chunks, chunks)
    squares = [(tile.rows, tile.queries) for tile in tiles]
    assert squares == [
        (slice(0, 2), slice(0, 4)),
        (slice(0, 2), slice(4, 10)),
        (slice(2, 3), slice(0, 10)),
    ]


def test_a_rank_of_the_ring_needs_one_tile_for_each_other_rank() -> None:
    """Half of the square of what two ranks hold: the work is the same for every pair."""
    for queries, keys in chunk_pairs(size=4, chunk=8):
        tiles = attention_tiles(1, None, queries, keys)
        assert len(tiles) == 1
        if queries != keys:
            sizes = [part.stop - part.start for part in (tiles[0].queries, tiles[0].keys)]
            assert sorted(sizes) == [8, 16]
