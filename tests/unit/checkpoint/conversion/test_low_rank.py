"""Blocks of B·A: the bits of the whole product for any shape and range, and every wanted value in one block."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_lora.checkpoint.conversion import low_rank
from mindspeed_lora.checkpoint.conversion.low_rank import LowRankProduct, blocks
from mindspeed_lora.models.families.segments import Range, Segment

SIZES = st.one_of(st.integers(1, 40), st.integers(200, 560), st.integers(1000, 1100))


@st.composite
def ranges(draw: st.DrawFn, size: int) -> Range:
    start = draw(st.integers(0, size - 1))
    return start, draw(st.integers(start + 1, size))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=SIZES, columns=SIZES, rank=st.sampled_from([1, 2, 3, 4, 8, 16, 17, 64, 256]))
def test_regions_have_the_bits_of_the_whole(data: st.DataObject, rows: int, columns: int, rank: int):
    generator = torch.Generator().manual_seed(rows * columns + rank)
    lora_a, lora_b = (torch.randn(size, generator=generator) for size in ((rank, columns), (rows, rank)))
    whole = (lora_b @ lora_a) * 0.3
    (top, bottom), (left, right) = data.draw(ranges(rows)), data.draw(ranges(columns))
    found = LowRankProduct(lora_a, lora_b, 0.3).region((top, bottom), (left, right))
    assert torch.equal(found, whole[top:bottom, left:right])


def test_a_product_cut_anywhere_would_have_other_bits():
    """What widening is for."""
    torch.manual_seed(0)
    lora_a, lora_b = torch.randn(17, 960), torch.randn(1025, 17)
    whole = lora_b @ lora_a
    assert not torch.equal(lora_b[1024:] @ lora_a, whole[1024:])
    assert torch.equal(LowRankProduct(lora_a, lora_b, 1.0).region((1024, 1025), (0, 960)), whole[1024:])


@settings(max_examples=40, deadline=None)
@given(data=st.data(), groups=st.integers(1, 5), head=st.integers(1, 150), repeat=st.integers(1, 3))
def test_blocks_cover_what_is_wanted_once(data: st.DataObject, groups: int, head: int, repeat: int):
    """Query groups as in ``linear_qkv``: each value says which matrix, row and column it is."""
    segments = [
        Segment(part, group * size, (group + 1) * size)
        for group in range(groups)
        for part, size in ((0, repeat * head), (1, head), (2, head))
    ]
    width, height = 6, groups * head * (repeat + 2)
    whole = torch.cat(
        [
            part * 1e6 + torch.arange(start, stop)[:, None] * 10.0 + torch.arange(width)
            for part, start, stop in segments
        ]
    )
    cut = [data.draw(ranges(height)) for _ in range(2)]
    side = [data.draw(ranges(width))]
    read = torch.cat([whole[start:stop] for start, stop in cut])[:, side[0][0] : side[0][1]]
    seen = torch.zeros_like(read)
    before = low_rank.BLOCK_BYTES, low_rank.BLOCK_COLUMNS
    low_rank.BLOCK_BYTES, low_rank.BLOCK_COLUMNS = 1, 4
    try:
        found = list(blocks(segments, (cut, side)))
    finally:
        low_rank.BLOCK_BYTES, low_rank.BLOCK_COLUMNS = before
    for block in found:
        assert block.rows[1] - block.rows[0] <= 256
        assert block.columns[1] - block.columns[0] <= 4
        for run in block.runs:
            assert block.rows[0] <= run.start < run.stop <= block.rows[1]
            expected = block.part * 1e6 + torch.arange(run.start, run.stop)[:, None] * 10.0
            assert torch.equal(block.window(run, read), expected + torch.arange(*block.columns))
            block.window(run, seen).add_(1)
    assert torch.equal(seen, torch.ones_like(seen))
