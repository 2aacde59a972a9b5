"""Quantised weights cut over ranks and put together again: random shapes, rows that are no multiple of a block."""

from __future__ import annotations

import random

import pytest
import torch

from mindspeed_lora.checkpoint.canonical import TensorRule
from mindspeed_lora.checkpoint.quantized.shards import Cut, joined_matrices, shard_specs, shard_tensors
from mindspeed_lora.checkpoint.quantized.state import STATE, State, parse_state
from mindspeed_lora.checkpoint.quantized.values import dequantize_rows
from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families.segments import Segment
from mindspeed_lora.quantization.matrix import QuantizedMatrix, dequantize, quantize

SETTINGS = [
    QuantSettings("nf4", 64, double=True),
    QuantSettings("nf4", 32),
    QuantSettings("fp4", 128, double=True),
    QuantSettings("int8"),
]


def random_cut(draw: random.Random) -> Cut:
    """q, k and v interleaved by group, gate above up, or one matrix cut by columns, over some ranks."""
    kind, size, width = (
        draw.choice(["qkv", "gate_up", "columns", "whole"]),
        draw.choice([1, 2, 4]),
        draw.randint(3, 90),
    )
    if kind == "qkv":
        head, repeats, groups = draw.randint(1, 9), draw.choice([1, 3]), 4
        segments = [
            segment
            for group in range(groups)
            for segment in (
                Segment(0, group * repeats * head, (group + 1) * repeats * head),
                Segment(1, group * head, (group + 1) * head),
                Segment(2, group * head, (group + 1) * head),
            )
        ]
        return Cut(tuple(segments), (groups * head * (repeats + 2), width), TensorRule(0), size)
    rows = 4 * draw.randint(1, 17)
    if kind == "gate_up":
        return Cut((Segment(0, 0, rows), Segment(1, 0, rows)), (2 * rows, width), TensorRule(0, 2), size)
    if kind == "columns":
        return Cut((Segment(0, 0, rows),), (rows, 4 * width), TensorRule(1), size)
    return Cut((Segment(0, 0, rows),), (rows, width), TensorRule(None), 1)


def matrices_of(cut: Cut, settings: QuantSettings) -> list[QuantizedMatrix]:
    generator = torch.Generator().manual_seed(1)
    return [quantize(torch.randn(shape, generator=generator), settings, "m") for shape in cut.shapes]


def assert_same(found: QuantizedMatrix, expected: QuantizedMatrix) -> None:
    assert (found.settings, found.shape, found.dtype) == (expected.settings, expected.shape, expected.dtype)
    assert torch.equal(found.packed, expected.packed) and torch.equal(found.absmax, expected.absmax)
    assert (found.nested is None) == (expected.nested is None)
    if found.nested is not None and expected.nested is not None:
        assert torch.equal(found.nested.absmax, expected.nested.absmax)
        assert torch.equal(found.nested.offset, expected.nested.offset)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_shards_give_the_whole_matrices_again(settings: QuantSettings) -> None:
    draw = random.Random(0)
    for _ in range(60):
        cut = random_cut(draw)
        matrices = matrices_of(cut, settings)
        shards = list(shard_tensors(cut, matrices))
        states = []
        for rank, shard in enumerate(shards):
            specs = shard_specs(cut, rank, settings, torch.float32)
            assert {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in shard.items()} == specs
            if settings.kind != "int8":
                data = bytes(shard[f"{STATE}{settings.kind}"].numpy())
                states.append(parse_state(data, settings.kind, "m"))
            else:
                states.append(State(settings, torch.float32, cut.local_shape(rank)))
        for found, expected in zip(joined_matrices(cut, shards, states, "m"), matrices, strict=True):
            assert_same(found, expected)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_rows_have_the_bits_of_the_whole(settings: QuantSettings) -> None:
    """Also rows that begin within a block, and a number of values that is odd."""
    draw = random.Random(1)
    for rows, width in [(7, 45), (33, 64), (300, 130), (1, 3)]:
        matrix = quantize(torch.randn(rows, width).bfloat16(), settings, "m")
        whole = dequantize(matrix, matrix.dtype)
        for _ in range(12):
            start = draw.randrange(rows)
            stop = draw.randint(start + 1, rows)
            assert torch.equal(dequantize_rows(matrix, (start, stop)), whole[start:stop])


def test_shards_that_disagree_are_refused() -> None:
    """One block of which two shards hold other statistics: they are of different checkpoints."""
    cut = Cut((Segment(0, 0, 2),), (2, 96), TensorRule(0), 2)
    settings = QuantSettings("nf4", 64)
    (matrix,) = matrices_of(cut, settings)
    shards = list(shard_tensors(cut, [matrix]))
    states = [parse_state(bytes(one[f"{STATE}nf4"].numpy()), "nf4", "m") for one in shards]
    assert [one[".absmax"].numel() for one in shards] == [2, 2]
    shards[1][".absmax"][0] += 1
    with pytest.raises(Refused, match="different statistics of one block"):
        joined_matrices(cut, shards, states, "m")
