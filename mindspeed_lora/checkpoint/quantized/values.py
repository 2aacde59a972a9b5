"""Ranges of the values that quantised matrices stand for, with the bits that the whole matrix has."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from mindspeed_lora.models.families.segments import Range, Segment, pieces
from mindspeed_lora.quantization.codebooks import dynamic_values
from mindspeed_lora.quantization.matrix import QuantizedMatrix, dequantize
from mindspeed_lora.quantization.runs import NESTED_BLOCK


def fill_values(
    out: torch.Tensor,
    matrices: Sequence[QuantizedMatrix],
    segments: Sequence[Segment],
    wanted: Sequence[Sequence[Range]],
) -> None:
    """Fill ``out`` with wanted ranges of rows and columns of a weight, whose rows are ``segments`` of the matrices."""
    rows, columns = wanted
    whole = [(0, matrices[0].shape[1])] == list(columns)
    for part, start, stop, at in pieces(segments, rows):
        values = dequantize_rows(matrices[part], (start, stop))
        kept = values if whole else torch.cat([values[:, low:high] for low, high in columns], dim=1)
        out[at : at + stop - start].copy_(kept)


def dequantize_rows(matrix: QuantizedMatrix, rows: Range) -> torch.Tensor:
    """Rows ``[start, stop)`` of the values, in the matrix's own dtype; only their blocks are decoded."""
    (start, stop), width, block = rows, matrix.shape[1], matrix.settings.block_size
    if (start, stop) == (0, matrix.shape[0]):
        return dequantize(matrix, matrix.dtype)
    if matrix.settings.kind == "int8":
        some = dataclasses.replace(
            matrix,
            shape=(stop - start, width),
            packed=matrix.packed[start:stop],
            absmax=matrix.absmax[start:stop],
        )
        return dequantize(some, matrix.dtype)
    first, last = start * width // block, -(-stop * width // block)
    end = min(last * block, matrix.shape[0] * width)
    run = dataclasses.replace(
        matrix,
        settings=dataclasses.replace(matrix.settings, double=False),
        shape=(1, end - first * block),
        packed=matrix.packed[first * block // 2 : -(-end // 2)],
        absmax=_statistics(matrix, first, last),
        nested=None,
    )
    skipped = start * width - first * block
    return dequantize(run, matrix.dtype).view(-1)[skipped : skipped + (stop - start) * width].view(-1, width)


def _statistics(matrix: QuantizedMatrix, first: int, last: int) -> torch.Tensor:
    """The largest magnitudes of blocks ``[first, last)``, decoded."""
    some, nested = matrix.absmax[first:last], matrix.nested
    if nested is None:
        return some
    groups = torch.arange(first, first + some.numel()) // NESTED_BLOCK
    return dynamic_values(some.device)[some.int()].mul_(nested.absmax[groups]).add_(nested.offset)
