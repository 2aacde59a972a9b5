"""A rank's shard of a weight, quantised while it is read: one whole Hugging Face matrix at a time.

Blocks and statistics are those of each Hugging Face matrix (q, k, v; gate, up; each expert's), so that every layout
holds the same numbers; a rank therefore reads whole matrices and keeps its piece of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from mindspeed_lora.checkpoint.loading.local_parameters import LocalParameter
from mindspeed_lora.checkpoint.source import Source
from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.models.families import FAMILIES
from mindspeed_lora.models.families.segments import Range, Segment, pieces
from mindspeed_lora.quantization.matrix import QuantizedMatrix, quantize
from mindspeed_lora.quantization.runs import Piece
from mindspeed_lora.quantization.shard import QuantizedWeight


def quantized_weights(
    parameters: Sequence[LocalParameter], source: Source, settings: QuantSettings
) -> Iterator[QuantizedWeight]:
    """This rank's shards, in the order of the plain parameters that they take the place of.

    While a matrix is quantised the next one is read, so that two whole ones are held at most.

    Args:
        parameters: each computes in its own dtype.
        source: of plain values, which are quantised, or of matrices that are so already.
        settings: how plain values are quantised.

    Raises:
        Refused: a matrix holds NaN or infinite values.
    """
    plain = _read_ahead(
        source,
        (request for one in parameters for name in one.members for request in _requests(one, name, source)),
    )
    for parameter in parameters:
        family, whole = FAMILIES[source.shape.family], (parameter.shape[0], parameter.shape[1])
        pieces_of_all: list[Piece] = []
        count = 0
        for name in parameter.members:
            mapping, _ = family.mapping(name)
            segments = mapping.segments(source.shape, whole[0])
            pieces_of_all += shard_pieces(segments, parameter.axis, parameter.ranges, whole, count)
            count += len(mapping.hf)
        matrices = _matrices(parameter, source, plain, settings)
        shape, dtype = tuple(parameter.param.shape), parameter.param.dtype
        yield QuantizedWeight.from_matrices(matrices, pieces_of_all, shape, dtype)


def _matrices(
    parameter: LocalParameter, source: Source, plain: Iterator[torch.Tensor], settings: QuantSettings
) -> Iterator[QuantizedMatrix]:
    """The Hugging Face matrices of a parameter: as they are stored, or each from its stored values."""
    dtype = parameter.param.dtype
    for name in parameter.members:
        stored = source.quantized(name)
        if stored is not None:
            yield from stored
            continue
        mapping, layer = FAMILIES[source.shape.family].mapping(name)
        # A wider dtype than the stored one is exact, and is what the numbers are rounded to when they are decoded.
        rounding = torch.promote_types(source.dtype(name), dtype)
        for hf_name in mapping.names(layer):
            yield quantize(next(plain), settings, f"{source.path}: {hf_name}", rounding)


def _requests(parameter: LocalParameter, name: str, source: Source) -> Iterator[tuple[str, Sequence[Range]]]:
    """Canonical weight and rows of each Hugging Face matrix in it that is stored plain."""
    if not source.is_quantized(name):
        mapping, _ = FAMILIES[source.shape.family].mapping(name)
        yield from ((name, rows) for rows in mapping.places(source.shape, parameter.shape[0]))


def _read_ahead(source: Source, requests: Iterable[tuple[str, Sequence[Range]]]) -> Iterator[torch.Tensor]:
    """Rows of weights, each read in a thread while the one before it is in use."""
    with ThreadPoolExecutor(1, "read-ahead") as reader:
        ahead: Future[torch.Tensor] | None = None
        for name, rows in requests:
            following = reader.submit(source.read, name, 0, rows)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()


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
