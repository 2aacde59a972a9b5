"""Slices of tensors against the plain way: whole tensors, cut and put together by torch."""

from __future__ import annotations

import random

import pytest
import torch

from mindspeed_lora.training.shard_slice import ShardSlice

EMBEDDING = "embedding.word_embeddings.weight"


def plain_index(piece: ShardSlice) -> list[int]:
    """Every position of the whole tensor, cut."""
    numbers = torch.arange(torch.Size(piece.shape).numel()).view(piece.shape)
    if piece.axis is not None:
        cut = [numbers.narrow(piece.axis, start, stop - start) for start, stop in piece.ranges]
        numbers = torch.cat(cut, dim=piece.axis)
    return list(numbers.reshape(-1)[piece.start : piece.stop].tolist())


def test_a_whole_tensor_is_all_positions() -> None:
    assert ShardSlice("x", (2, 3), None, (), 0, 6).index().tolist() == [0, 1, 2, 3, 4, 5]
    assert ShardSlice("x", (4,), None, (), 1, 3).index().tolist() == [1, 2]


def test_rows_of_two_blocks() -> None:
    """TP rank 1 of 2 of gate above up: the second half of each."""
    piece = ShardSlice("x", (8, 2), 0, ((2, 4), (6, 8)), 0, 8)
    assert piece.index().tolist() == [4, 5, 6, 7, 12, 13, 14, 15]


def test_columns_and_a_part_of_the_flattened_shard() -> None:
    piece = ShardSlice("x", (3, 4), 1, ((2, 4),), 1, 5)
    assert piece.index().tolist() == [3, 6, 7, 10]


def slices(shape: tuple[int, int], draw: random.Random) -> list[ShardSlice]:
    """A random cut of a tensor over TP ranks and data-parallel ranks."""
    axis, tp, dp = draw.choice([(None, 1), (0, 1), (0, 2), (0, 4), (1, 2), (1, 4)]) + (
        draw.choice([1, 2, 3]),
    )
    blocks = 2 if axis == 0 and tp == 2 else 1
    found = []
    for rank in range(tp):
        ranges: tuple[tuple[int, int], ...] = ()
        size = shape[0] * shape[1] // tp
        if axis is not None:
            block = shape[axis] // blocks
            width = block // tp
            ranges = tuple((b * block + rank * width, b * block + (rank + 1) * width) for b in range(blocks))
        cuts = sorted({0, size, *(draw.randrange(size) for _ in range(dp - 1))})
        found += [ShardSlice("x", shape, axis, ranges, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    return found


@pytest.mark.parametrize("seed", range(40))
def test_any_cut_is_read_from_any_other(seed: int) -> None:
    draw = random.Random(seed)
    shape = (8, 12)
    whole = torch.randn(shape).view(-1)
    pieces = slices(shape, draw)
    for wanted in slices(shape, draw):
        index = plain_index(wanted)
        assert wanted.index().tolist() == index
        values = torch.zeros(len(index))
        known = torch.zeros(len(index), dtype=torch.int64)
        for piece in pieces:
            marked = torch.zeros(len(index), dtype=torch.bool)
            wanted.take(piece, whole[plain_index(piece)], values, marked)
            known += marked
        assert values.equal(whole[index])
        assert bool((known == 1).all()), "each element comes from one piece"


@pytest.mark.parametrize(("rows", "wanted_rows"), [(6, 8), (8, 6), (6, 6)])
def test_rows_that_pad_the_vocabulary_are_zero(rows: int, wanted_rows: int) -> None:
    piece = ShardSlice(EMBEDDING, (rows, 2), 0, ((0, rows),), 0, 2 * rows)
    wanted = ShardSlice(EMBEDDING, (wanted_rows, 2), 0, ((2, wanted_rows),), 1, 2 * (wanted_rows - 2))
    assert piece.is_of(wanted)
    values, known = torch.zeros(wanted.stop - 1), torch.zeros(wanted.stop - 1, dtype=torch.bool)
    wanted.take(piece, torch.arange(1.0, 2 * rows + 1), values, known)
    assert bool(known.all())
    expected = [float(i + 1) if i < 2 * rows else 0.0 for i in range(5, 2 * wanted_rows)]
    assert values.tolist() == expected


def test_what_no_piece_holds_stays_unknown() -> None:
    wanted, piece = ShardSlice("x", (4,), None, (), 0, 4), ShardSlice("x", (4,), None, (), 1, 3)
    known = torch.zeros(4, dtype=torch.bool)
    wanted.take(piece, torch.ones(2), torch.zeros(4), known)
    assert known.tolist() == [False, True, True, False]


def test_only_the_vocabulary_may_differ_in_rows() -> None:
    assert not ShardSlice("x", (4, 2), None, (), 0, 8).is_of(ShardSlice("x", (6, 2), None, (), 0, 12))
    assert not ShardSlice("x", (4,), None, (), 0, 4).is_of(ShardSlice("y", (4,), None, (), 0, 4))
