"""One whole Hugging Face matrix, quantised as bitsandbytes does on the CPU, bit for bit.

The numbers are those of bitsandbytes 0.50.2: ``quantize_4bit``, ``dequantize_4bit``, ``int8_vectorwise_quant`` and
``int8_vectorwise_dequant``. Four bits: a block of ``block_size`` consecutive numbers, rows one after the other, keeps
its largest magnitude; each number is divided by it and takes the code of the nearest value. Nested statistics: the
magnitudes less their mean are quantised over blocks of 256 by the dynamic map. int8: each row by its own magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.errors import Refused
from mindspeed_lora.quantization.codebooks import dynamic_lookup, dynamic_values
from mindspeed_lora.quantization.decoding import decode_blocks, decode_rows
from mindspeed_lora.quantization.encoding import encode_four_bits, encode_rows
from mindspeed_lora.quantization.runs import NESTED_BLOCK

Tensor = torch.Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Nested:
    """What decodes eight-bit statistics: ``values[code] * absmax[block // 256] + offset``."""

    absmax: Tensor
    """float32 ``[ceil(blocks / 256)]``."""
    offset: Tensor
    """float32 ``[]``: the mean of the magnitudes of the whole matrix."""


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix ``[out, in]`` in bitsandbytes' form."""

    settings: QuantSettings
    shape: tuple[int, int]
    packed: Tensor
    """uint8 ``[ceil(out * in / 2), 1]``, the first of two numbers in the high half; of int8: int8 ``[out, in]``."""
    absmax: Tensor
    """float32 ``[blocks]``, nested: uint8 ``[blocks]``; of int8: float32 ``[out]`` (bitsandbytes' ``SCB``)."""
    nested: Nested | None = None
    dtype: torch.dtype = torch.float32
    """What its numbers are rounded to before anything else: of four bits that of the matrix that was quantised."""

    def statistics(self) -> Tensor:
        """The largest magnitudes, decoded: float32 ``[blocks]`` or ``[out]``."""
        if self.nested is None:
            return self.absmax
        return decode_statistics(self.absmax, self.nested)


def quantize(
    matrix: Tensor, settings: QuantSettings, name: str, dtype: torch.dtype | None = None
) -> QuantizedMatrix:
    """Quantises ``matrix [out, in]`` (float32, bfloat16 or float16); ``name`` is the tensor's, for refusals.

    ``dtype`` (default: the matrix's) is what the numbers are rounded to when they are dequantised. Holds,
    beside the result, buffers of a fixed size.

    Raises:
        Refused: NaN or infinite values, or nested statistics overflow.
    """
    if matrix.dtype not in _DTYPES:
        raise Refused(
            f"{name} has dtype {str(matrix.dtype).removeprefix('torch.')}; quantising takes float32, bfloat16 or"
            " float16: convert the checkpoint first, or load it without --qlora"
        )
    shape = (matrix.size(0), matrix.size(1))
    if settings.kind == "int8":  # has no dtype of its own
        dtype = torch.float32
        packed, absmax = encode_rows(matrix)
    else:
        packed, absmax = encode_four_bits(matrix.reshape(-1), settings.kind, settings.block_size)
    if not torch.isfinite(absmax).all():
        raise Refused(f"{name} holds NaN or infinite values, which cannot be quantised: {_where(matrix)}")
    if settings.kind == "int8" or not settings.double:
        return QuantizedMatrix(settings, shape, packed, absmax, dtype=dtype or matrix.dtype)
    codes, nested = encode_statistics(absmax)
    if not torch.isfinite(nested.offset):
        raise Refused(
            f"{name} holds values up to {absmax.max().item():.3g}, whose mean magnitude overflows float32: leave out"
            " --quant-double"
        )
    return QuantizedMatrix(settings, shape, packed, codes, nested, dtype or matrix.dtype)


def dequantize(matrix: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    """The numbers ``[out, in]`` that a quantised matrix stands for.

    Computed in float32 and rounded to the matrix's own dtype, then to ``dtype``: bitsandbytes and transformers do both.
    """
    settings, out = matrix.settings, torch.empty(matrix.shape, dtype=dtype, device=matrix.packed.device)
    if settings.kind == "int8":
        decode_rows(matrix.packed, matrix.absmax, matrix.dtype, out)
    else:
        codes, scales = matrix.packed.view(-1), matrix.statistics()
        decode_blocks(codes, scales, settings.block_size, settings.kind, matrix.dtype, out.view(-1))
    return out


def encode_statistics(absmax: Tensor) -> tuple[Tensor, Nested]:
    """Eight-bit codes ``uint8 [blocks]`` of ``absmax [blocks]``, and what decodes them."""
    with _one_thread():  # so that the last bit of the mean does not depend on the number of threads
        offset = absmax.mean()
    centred = absmax - offset
    blocks = torch.nn.functional.pad(centred, (0, -centred.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    magnitudes = torch.linalg.vector_norm(blocks, ord=math.inf, dim=1)
    scaled = (blocks * magnitudes.reciprocal().unsqueeze(1)).clamp_(-1.0, 1.0)
    # Zero times infinity: the magnitude is too small for a reciprocal.
    steps = ((scaled.nan_to_num_(nan=-1.0) + 1.0) * 0.5).double()
    # The product and the sum are rounded once, as a fused multiply-add does.
    steps = steps.mul_(65535.0).add_(0.5).float().int()
    codes = dynamic_lookup().to(absmax.device)[steps]
    codes[magnitudes == 0] = 0
    return codes.view(-1)[: absmax.numel()].clone(), Nested(magnitudes, offset)


def decode_statistics(codes: Tensor, nested: Nested) -> Tensor:
    """The magnitudes ``float32 [blocks]`` that eight-bit ``codes [blocks]`` stand for."""
    values = dynamic_values(codes.device).index_select(0, codes.int())
    scales = nested.absmax.repeat_interleave(NESTED_BLOCK)[: codes.numel()]
    return values.mul_(scales).add_(nested.offset)


def _where(matrix: Tensor) -> str:
    """The first number that is not finite, in words."""
    row, column = (~torch.isfinite(matrix)).nonzero()[0].tolist()
    return f"row {row}, column {column} is {matrix[row, column].item()}"


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
