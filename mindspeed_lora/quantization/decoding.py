"""Codes to numbers: each code's value times its block's magnitude, in float32, rounded at the end.

A table of bytes gives two numbers at once. Work goes tile by tile, so that what is between the codes and the numbers
stays in the cache; there are no other buffers than those of a tile. On CUDA a Triton kernel does it where Triton can
be imported (:mod:`.triton_decoding`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch

from mindspeed_lora.quantization.codebooks import four_bit_values

Tensor = torch.Tensor

_TILE = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Bytes of codes that are decoded at a time, a multiple of every block's; on CUDA a launch must pay."""

_INT8_UNIT = 7.874015718698502e-3
"""bitsandbytes' 1 / 127."""


@cache
def _pairs(kind: str, device: torch.device) -> Tensor:
    """``int64 [256]``: the two float32 values of each byte's codes, the high half's first in memory."""
    values = four_bit_values(kind, device)
    byte = torch.arange(256, device=device)
    return torch.stack([values[byte >> 4], values[byte & 15]], dim=1).view(torch.int64).view(-1)


def decode_blocks(
    codes: Tensor, scales: Tensor, block_size: int, kind: str, rounding: torch.dtype, out: Tensor
) -> None:
    """Numbers of whole blocks.

    Args:
        codes: uint8 ``[n / 2]``, from the beginning of a block.
        scales: float32 ``[ceil(n / block)]``.
        rounding: what the numbers are rounded to, before ``out`` takes them.
        out: ``[n]``, contiguous, of any floating dtype; n may end within the last block.
    """
    kernel = _kernel() if codes.is_cuda else None
    if kernel is not None:
        kernel(codes, scales, block_size, kind, rounding, out)
        return
    for first, values in _tiles(codes, kind, rounding, out):
        some = scales[first // block_size : (first + values.numel() + block_size - 1) // block_size]
        whole = values.numel() // block_size
        values[: whole * block_size].view(whole, block_size).mul_(some[:whole].unsqueeze(1))
        if some.numel() > whole:
            values[whole * block_size :].mul_(some[whole])
        _store(values, rounding, out[first : first + values.numel()])


def decode_counts(
    codes: Tensor, scales: Tensor, counts: Tensor, kind: str, rounding: torch.dtype, out: Tensor
) -> None:
    """Numbers of parts of blocks: ``counts [m]`` of them by each of ``scales [m]``; else :func:`decode_blocks`."""
    each = scales.repeat_interleave(counts, output_size=out.numel())
    for first, values in _tiles(codes, kind, rounding, out):
        some = slice(first, first + values.numel())
        _store(values.mul_(each[some]), rounding, out[some])


def decode_rows(codes: Tensor, magnitudes: Tensor, rounding: torch.dtype, out: Tensor) -> None:
    """``out [rows, columns]`` of int8 ``codes`` and float32 ``magnitudes [rows]``."""
    step = max(1, 2 * _TILE.get(codes.device.type, _TILE["cuda"]) // max(1, out.size(1)))
    for first in range(0, out.size(0), step):
        some = slice(first, first + step)
        _store((codes[some] * magnitudes[some].unsqueeze(1)).mul_(_INT8_UNIT), rounding, out[some])


def _tiles(codes: Tensor, kind: str, rounding: torch.dtype, out: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The values of ``codes`` before they are scaled, float32 tile by tile, and where each tile begins in ``out``.

    A tile is valid until the next one; it lies in ``out`` already where ``out`` can hold it.
    """
    table, step = _pairs(kind, codes.device), _TILE.get(codes.device.type, _TILE["cuda"])
    index = torch.empty(min(step, codes.numel()), dtype=torch.int32, device=codes.device)
    in_place = rounding == out.dtype == torch.float32 and out.storage_offset() % 2 == 0
    buffer = None
    for first in range(0, codes.numel(), step):
        some = codes[first : first + step]
        size = min(2 * some.numel(), out.numel() - 2 * first)
        if in_place and size % 2 == 0:
            pairs = out[2 * first : 2 * first + size].view(torch.int64)
        else:
            buffer = torch.empty_like(index, dtype=torch.int64) if buffer is None else buffer
            pairs = buffer[: some.numel()]
        torch.index_select(table, 0, index[: some.numel()].copy_(some), out=pairs)
        yield 2 * first, pairs.view(torch.float32)[:size]


def _store(values: Tensor, rounding: torch.dtype, out: Tensor) -> None:
    if values.data_ptr() != out.data_ptr() or values.is_meta:
        out.copy_(values if rounding in (torch.float32, out.dtype) else values.to(rounding))


@cache
def _kernel() -> Callable[[Tensor, Tensor, int, str, torch.dtype, Tensor], None] | None:
    """Triton's way, or None where it cannot be imported."""
    try:
        from mindspeed_lora.quantization import triton_decoding
    except ImportError:
        return None
    return triton_decoding.decode_blocks
