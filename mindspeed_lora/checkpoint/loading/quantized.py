"""A rank's shard of a weight, quantised while it is read: one whole Hugging Face matrix at a time.

Blocks and statistics are those of each Hugging Face matrix (q, k, v; gate, up; each expert's), so that every layout
holds the same numbers; a rank therefore reads whole matrices and keeps its piece of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mindspeed_lora.checkpoint.loading.local_parameters import LocalParameter
from mindspeed_lora.checkpoint.source import Source
from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.models.families import FAMILIES
from mindspeed_lora.models.families.segments import Range, Segment, pieces
from mindspeed_lora.quantization.matrix import QuantizedMatrix, quantize
from mindspeed_lora.quantization.runs import Piece
from mindspeed_lora.quantization.shard import QuantizedWeight


def quantized_weight(
    parameter: LocalParameter, source: Source, settings: QuantSettings, dtype: torch.dtype
) -> QuantizedWeight:
    """This rank's shard of the weights that a parameter is made of.

    Args:
        parameter: the plain parameter that it takes the place of.
        source: of plain values, which are quantised, or of matrices that are so already.
        settings: how plain values are quantised.
        dtype: that products are computed in.

    Raises:
        Refused: a matrix holds NaN or infinite values.
    """
    family, whole = FAMILIES[source.shape.family], (parameter.shape[0], parameter.shape[1])
    pieces_of_all: list[Piece] = []
    count = 0
    for name in parameter.members:
        mapping, _ = family.mapping(name)
        segments = mapping.segments(source.shape, whole[0])
        pieces_of_all += shard_pieces(segments, parameter.axis, parameter.ranges, whole, count)
        count += len(mapping.hf)
    matrices = (
        matrix for name in parameter.members for matrix in _matrices(name, whole[0], source, settings, dtype)
    )
    return QuantizedWeight.from_matrices(matrices, pieces_of_all, tuple(parameter.param.shape), dtype)


def _matrices(
    name: str, rows: int, source: Source, settings: QuantSettings, dtype: torch.dtype
) -> Iterator[QuantizedMatrix]:
    """The Hugging Face matrices of one canonical weight: as they are stored, or each from its stored values."""
    stored = source.quantized(name)
    if stored is not None:
        yield from stored
        return
    mapping, layer = FAMILIES[source.shape.family].mapping(name)
    places = mapping.places(source.shape, rows)
    for hf_name, own_rows in zip(mapping.names(layer), places, strict=True):
        values = source.read(name, 0, own_rows)
        # A wider dtype than the stored one is exact, and is what the numbers are rounded to when they are decoded.
        yield quantize(
            values.to(torch.promote_types(values.dtype, dtype)), settings, f"{source.path}: {hf_name}"
        )


def shard_pieces(
    segments: Sequence[Segment],
    axis: int | None,
    ranges: Sequence[Range],
    whole: tuple[int, int],
    first: int = 0,
) -> Iterator[Piece]:
    """What a rank holds of a canonical weight ``whole [out, in]``, in the order of its rows.

    Args:
        segments: rows of the Hugging Face matrices in the weight's order.
        axis: that is cut, or None.
        ranges: along it, of this rank.
        whole: the weight's shape.
        first: number of the first matrix.
    """
    rows = ranges if axis == 0 else ((0, whole[0]),)
    columns = ranges[0] if axis == 1 else (0, whole[1])
    for part, start, stop, _ in pieces(segments, rows):
        yield Piece(first + part, (start, stop), columns)
