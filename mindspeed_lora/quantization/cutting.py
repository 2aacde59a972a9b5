"""Cuts a shard's codes and statistics out of whole quantised matrices, one matrix at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.quantization.matrix import QuantizedMatrix
from mindspeed_lora.quantization.runs import Piece, Run

Tensor = torch.Tensor


@dataclass(frozen=True)
class Cut:
    """What a shard keeps, in the order of its numbers."""

    settings: QuantSettings
    rounding: torch.dtype
    """:attr:`QuantizedMatrix.dtype`."""
    runs: tuple[Run, ...]
    """One of each piece; none of int8."""
    codes: Tensor
    """uint8 ``[ceil(n / 2)]``; of int8: int8 ``[n]``."""
    statistics: Tensor
    """One of each block that a run touches: float32, nested uint8; of int8: float32, one of each row."""
    nested: Tensor | None
    """float32 ``[2, m]``: magnitude and offset of the blocks of 256 statistics that the runs touch."""


def cut(matrices: Iterable[QuantizedMatrix], pieces: Sequence[Piece]) -> Cut:
    """The numbers of ``pieces``, one below the other; ``matrices`` come in order and are not kept."""
    maker: _FourBits | _Rows | None = None
    for index, matrix in enumerate(matrices):
        if maker is None:
            maker = (_Rows if matrix.settings.kind == "int8" else _FourBits)(matrix, pieces)
        assert (matrix.settings, matrix.dtype) == (maker.settings, maker.rounding)
        for position, piece in enumerate(pieces):
            if piece.matrix == index:
                maker.take(position, matrix)
    assert maker is not None
    return maker.finish()


class _Rows:
    """int8: codes of whole or cut rows, each with the magnitude of its row."""

    def __init__(self, like: QuantizedMatrix, pieces: Sequence[Piece]) -> None:
        self.settings, self.rounding, self.pieces = like.settings, like.dtype, pieces
        self.codes: list[Tensor | None] = [None] * len(pieces)
        self.statistics: list[Tensor | None] = [None] * len(pieces)

    def take(self, position: int, matrix: QuantizedMatrix) -> None:
        """Cuts piece number ``position``."""
        piece = self.pieces[position]
        self.codes[position] = matrix.packed[slice(*piece.rows), slice(*piece.columns)].reshape(-1)
        self.statistics[position] = matrix.absmax[slice(*piece.rows)]

    def finish(self) -> Cut:
        """What was cut."""
        return Cut(self.settings, self.rounding, (), _joined(self.codes), _joined(self.statistics), None)


class _FourBits:
    """Codes two in a byte, as in the matrix, and the statistics of every block that they touch."""

    def __init__(self, like: QuantizedMatrix, pieces: Sequence[Piece]) -> None:
        self.settings, self.rounding, self.pieces = like.settings, like.dtype, pieces
        sizes = [piece.size for piece in pieces]
        self.places = [sum(sizes[:i]) for i in range(len(sizes))]
        self.codes = torch.zeros((sum(sizes) + 1) // 2, dtype=torch.uint8, device=like.packed.device)
        self.runs: list[Run | None] = [None] * len(pieces)
        self.statistics: list[Tensor | None] = [None] * len(pieces)
        self.nested: list[Tensor | None] = [None] * len(pieces)

    def take(self, position: int, matrix: QuantizedMatrix) -> None:
        """Cuts piece number ``position``."""
        run = Run.of(
            self.pieces[position], matrix.shape[1], self.settings.block_size, self.places[position], 0
        )
        self.runs[position] = run
        self._take_codes(run, matrix)
        blocks = run.block_indices(0, run.num_statistics, matrix.absmax.device)
        self.statistics[position] = matrix.absmax[blocks.clamp_(max=matrix.absmax.numel() - 1)]
        if matrix.nested is not None:
            first = run.first_nested_block
            magnitudes = matrix.nested.absmax[first : first + run.num_nested]
            self.nested[position] = torch.stack([magnitudes, matrix.nested.offset.expand_as(magnitudes)])

    def _take_codes(self, run: Run, matrix: QuantizedMatrix) -> None:
        bytes_of = matrix.packed.view(-1)
        if run.is_even:
            first = bytes_of.storage_offset() + run.start // 2
            found = bytes_of.as_strided((run.count, run.length // 2), (run.stride // 2, 1), first)
            self.codes[run.place // 2 : run.end // 2].view(run.count, -1).copy_(found)
            return
        first = run.start // 2
        last = (run.start + (run.count - 1) * run.stride + run.length + 1) // 2
        halves = torch.stack([bytes_of[first:last] >> 4, bytes_of[first:last] & 15], dim=1).view(-1)
        found = halves.as_strided((run.count, run.length), (run.stride, 1), run.start % 2).reshape(-1)
        self._put(run.place, found)

    def _put(self, place: int, halves: Tensor) -> None:
        """Writes ``halves``, one number in each byte, from number ``place`` on."""
        if place % 2:
            self.codes[place // 2] |= halves[0]
            place, halves = place + 1, halves[1:]
        pairs = halves[: halves.numel() // 2 * 2].view(-1, 2)
        self.codes[place // 2 : place // 2 + pairs.size(0)] = (pairs[:, 0] << 4) | pairs[:, 1]
        if halves.numel() % 2:
            self.codes[place // 2 + pairs.size(0)] |= halves[-1] << 4

    def finish(self) -> Cut:
        """What was cut."""
        runs: list[Run] = []
        statistic = nested = 0
        for run, more in zip(self.runs, self.nested, strict=True):
            assert run is not None, "a piece of a matrix that did not come"
            runs.append(dataclasses.replace(run, first_statistic=statistic, first_nested=nested))
            statistic += run.num_statistics
            nested += 0 if more is None else more.size(1)
        return Cut(
            self.settings,
            self.rounding,
            tuple(runs),
            self.codes,
            _joined(self.statistics),
            _joined(self.nested, dim=1) if self.settings.double else None,
        )


def _joined(parts: Sequence[Tensor | None], dim: int = 0) -> Tensor:
    return torch.cat([part for part in parts if part is not None], dim=dim)
