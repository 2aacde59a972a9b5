"""A quantised weight cut over ranks, and put together again: whole matrices from the shards of any layout.

A shard of a canonical weight ``[out, in]`` holds the codes of its own values in its own order, and of every block of a
Hugging Face matrix that one of its values lies in the statistics: for each of the matrices in turn, ascending. A block
that a boundary cuts is in several shards. Nested statistics of whole matrices are in every shard, since there are so
few of them (one for 16,384 values), and so is each matrix's mean.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mindspeed_lora.checkpoint.canonical import TensorRule, shard_ranges
from mindspeed_lora.checkpoint.quantized.state import (
    ABSMAX,
    NESTED_ABSMAX,
    STATE,
    State,
    code_tables,
    four_bit_specs,
    num_blocks,
    num_nested,
    state_bytes,
    state_tensor,
)
from mindspeed_lora.checkpoint.storage.tensor_writer import TensorSpec
from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families.segments import Range, Segment, part_sizes, pieces
from mindspeed_lora.quantization.matrix import Nested, QuantizedMatrix

ROWS = ".SCB"
"""What the name of an int8 weight has behind it in that of its rows' largest magnitudes, float32 ``[out]``."""


@dataclass(frozen=True)
class Cut:
    """How a canonical weight is made of matrices, and cut over ranks."""

    segments: tuple[Segment, ...]
    """Rows of the Hugging Face matrices, in canonical order."""
    full: tuple[int, int]
    rule: TensorRule
    size: int
    """Number of different shards: of ranks, or 1 where each has the whole."""

    @functools.cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """``[out, in]`` of each matrix."""
        return [(rows, self.full[1]) for rows in part_sizes(self.segments)]

    def ranges(self, rank: int) -> tuple[list[Range], Range]:
        """The canonical rows and columns of a rank."""
        rows, columns = [(0, self.full[0])], (0, self.full[1])
        if self.rule.axis == 0:
            rows = shard_ranges(self.rule, self.full[0], rank, self.size)
        elif self.rule.axis == 1:
            (columns,) = shard_ranges(self.rule, self.full[1], rank, self.size)
        return rows, columns

    def local_shape(self, rank: int) -> tuple[int, int]:
        """Shape of a rank's shard."""
        rows, columns = self.ranges(rank)
        return sum(stop - start for start, stop in rows), columns[1] - columns[0]

    def touched(self, rank: int, part: int, block_size: int) -> torch.Tensor:
        """Which blocks of a matrix a rank's values lie in: bool ``[blocks]``."""
        rows, (left, right) = self.ranges(rank)
        width, blocks = self.full[1], -(-self.shapes[part][0] * self.full[1] // block_size)
        steps = torch.zeros(blocks + 1, dtype=torch.int32)
        for _, start, stop, _ in (piece for piece in pieces(self.segments, rows) if piece.part == part):
            # Runs of values without a hole: row by row, or all rows at once where no column is left out.
            first = torch.arange(start, stop) if right - left < width else torch.tensor([start])
            last = first if right - left < width else torch.tensor([stop - 1])
            ones = torch.ones(first.numel(), dtype=torch.int32)
            steps.index_add_(0, (first * width + left) // block_size, ones)
            steps.index_add_(0, (last * width + right - 1) // block_size + 1, -ones)
        return steps[:-1].cumsum(0) > 0

    def unit(self, settings: QuantSettings) -> int:
        """How many neighbouring codes always stay together: two of a byte, where all rows and cuts are even."""
        _, (left, right) = self.ranges(0)
        is_even = self.full[1] % 2 == 0 and (right - left) % 2 == 0
        return 2 if is_even and settings.kind != "int8" else 1

    def num_touched(self, rank: int, block_size: int) -> int:
        """Blocks of all matrices that a rank's values lie in."""
        return _num_touched(self, rank, block_size)


@functools.lru_cache(maxsize=4096)
def _num_touched(cut: Cut, rank: int, block_size: int) -> int:
    """The same for all layers of a model."""
    return sum(int(cut.touched(rank, part, block_size).sum()) for part in range(len(cut.shapes)))


def shard_specs(cut: Cut, rank: int, settings: QuantSettings, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Dtype and shape of the tensors of a rank's shard, by what their names have behind the weight's."""
    shape = cut.local_shape(rank)
    if settings.kind == "int8":
        return {"": (torch.int8, shape), ROWS: (torch.float32, shape[:1])}
    return four_bit_specs(
        settings,
        shape[0] * shape[1],
        cut.num_touched(rank, settings.block_size),
        sum(num_nested(one, settings) for one in cut.shapes),
        state_bytes(settings, dtype, shape, len(cut.shapes)),
    )


def shard_tensors(cut: Cut, matrices: Sequence[QuantizedMatrix]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of each rank's shard, rank by rank."""
    settings = matrices[0].settings
    unit = cut.unit(settings)
    codes = _joined(cut, [codes_of(matrix.packed, matrix.shape, settings, unit) for matrix in matrices])
    rows = _joined(cut, [matrix.absmax for matrix in matrices]) if settings.kind == "int8" else None
    tables = {} if rows is not None else code_tables(settings)
    for rank in range(cut.size):
        own, (left, right) = cut.ranges(rank)
        shard = torch.cat([codes[start:stop, left // unit : right // unit] for start, stop in own])
        if rows is not None:
            yield {"": shard, ROWS: torch.cat([rows[start:stop] for start, stop in own])}
            continue
        tensors = {"": packed(shard, unit), **tables}
        tensors[ABSMAX] = torch.cat(
            [
                matrix.absmax[cut.touched(rank, part, settings.block_size)]
                for part, matrix in enumerate(matrices)
            ]
        )
        offsets: list[float] = []
        if settings.double:
            nested = [matrix.nested for matrix in matrices if matrix.nested is not None]
            tensors[NESTED_ABSMAX] = torch.cat([one.absmax for one in nested])
            offsets = [float(one.offset) for one in nested]
        state = State(settings, matrices[0].dtype, cut.local_shape(rank), tuple(offsets))
        yield {**tensors, f"{STATE}{settings.kind}": state_tensor(state)}


def joined_matrices(
    cut: Cut, shards: Sequence[dict[str, torch.Tensor]], states: Sequence[State], name: str
) -> list[QuantizedMatrix]:
    """The whole matrices of a weight from all ranks' shards; ``name`` is for messages.

    Raises:
        Refused: two shards hold one block with different statistics.
    """
    settings, dtype = states[0].settings, states[0].dtype
    shards = shards[: cut.size]
    unit = cut.unit(settings)
    whole = torch.empty((cut.full[0], cut.full[1] // unit), dtype=shards[0][""].dtype)
    for rank, shard in enumerate(shards):
        rows, (left, right) = cut.ranges(rank)
        own, at = codes_of(shard[""], cut.local_shape(rank), settings, unit), 0
        for start, stop in rows:
            whole[start:stop, left // unit : right // unit] = own[at : at + stop - start]
            at += stop - start
    codes = _split(cut, whole)
    if settings.kind == "int8":
        vector = torch.empty(cut.full[0])
        for rank, shard in enumerate(shards):
            at = 0
            for start, stop in cut.ranges(rank)[0]:
                vector[start:stop] = shard[ROWS][at : at + stop - start]
                at += stop - start
        statistics = _split(cut, vector)
        return [
            QuantizedMatrix(settings, shape, part, rows)
            for shape, part, rows in zip(cut.shapes, codes, statistics, strict=True)
        ]
    statistics = _joined_statistics(cut, shards, settings, name)
    nested = _nested(cut, shards, states, name) if settings.double else [None] * len(codes)
    return [
        QuantizedMatrix(settings, shape, packed(part, unit), blocks, one, dtype)
        for shape, part, blocks, one in zip(cut.shapes, codes, statistics, nested, strict=True)
    ]


def _joined_statistics(
    cut: Cut, shards: Sequence[dict[str, torch.Tensor]], settings: QuantSettings, name: str
) -> list[torch.Tensor]:
    """The blocks' statistics of each matrix, each block's from the shards that hold it."""
    at, found = [0] * len(shards), []
    for part, shape in enumerate(cut.shapes):
        blocks = num_blocks(shape, settings)
        whole = torch.zeros(blocks, dtype=shards[0][ABSMAX].dtype)
        known = torch.zeros(blocks, dtype=torch.bool)
        for rank, shard in enumerate(shards):
            touched = cut.touched(rank, part, settings.block_size)
            stop = at[rank] + int(touched.sum())
            own = torch.zeros_like(whole)
            own[touched] = shard[ABSMAX][at[rank] : stop]
            at[rank] = stop
            both = known & touched
            if not torch.equal(own[both], whole[both]):
                raise Refused(
                    f"{name}{ABSMAX}: shards have different statistics of one block; they are of different checkpoints."
                )
            whole[touched] = own[touched]
            known |= touched
        found.append(whole)
    return found


def _nested(
    cut: Cut, shards: Sequence[dict[str, torch.Tensor]], states: Sequence[State], name: str
) -> list[Nested]:
    first = shards[0][NESTED_ABSMAX]
    if any(not torch.equal(shard[NESTED_ABSMAX], first) for shard in shards):
        raise Refused(f"{name}{NESTED_ABSMAX} differs between shards; they are of different checkpoints.")
    sizes = [num_nested(shape, states[0].settings) for shape in cut.shapes]
    return [
        Nested(absmax.clone(), torch.tensor(offset, dtype=torch.float32))
        for absmax, offset in zip(first.split(sizes), states[0].offsets, strict=True)
    ]


def codes_of(
    stored: torch.Tensor, shape: tuple[int, int], settings: QuantSettings, unit: int
) -> torch.Tensor:
    """Stored codes as rows of units: int8 ``[out, in]``, of four bits one or two of them in a byte."""
    if settings.kind == "int8":
        return stored
    pairs = stored.view(-1)
    if unit == 2:
        return pairs.view(shape[0], -1)
    both = torch.stack([pairs >> 4, pairs & 15], dim=1)
    return both.view(-1)[: shape[0] * shape[1]].view(shape)


def packed(codes: torch.Tensor, unit: int) -> torch.Tensor:
    """Rows of units as bytes of two four-bit codes, the first in the high half: uint8 ``[ceil(n / 2), 1]``."""
    flat = codes.reshape(-1)
    if unit == 2:
        return flat.view(-1, 1)
    if flat.numel() % 2:
        flat = torch.nn.functional.pad(flat, (0, 1))
    return ((flat[0::2] << 4) | flat[1::2]).view(-1, 1)


def _joined(cut: Cut, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of the matrices in canonical order."""
    return torch.cat([parts[part][start:stop] for part, start, stop in cut.segments])


def _split(cut: Cut, whole: torch.Tensor) -> list[torch.Tensor]:
    """Canonical rows as those of the matrices."""
    parts = [whole.new_empty((rows, *whole.shape[1:])) for rows, _ in cut.shapes]
    for part, start, stop, at in pieces(cut.segments, [(0, cut.full[0])]):
        parts[part][start:stop] = whole[at : at + stop - start]
    return parts
