"""Four-bit codes to numbers in one Triton kernel, for CUDA; the numbers are those of :mod:`.decoding`.

A program takes ``TILE`` numbers: it reads half as many bytes, looks both codes up in the table of sixteen values,
multiplies by the block's magnitude in float32 and rounds once (twice where the quantised dtype is another).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mindspeed_lora.quantization.codebooks import four_bit_values

Tensor = torch.Tensor

_TILE = 1024
_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _decode(  # type: ignore[no-untyped-def]  # Triton takes annotations for types of its own
    codes, scales, values, out, size, BLOCK: tl.constexpr, TILE: tl.constexpr, ROUNDING: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * TILE
    byte = first // 2 + tl.arange(0, TILE // 2)
    inside = 2 * byte < size
    pair = tl.load(codes + byte, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales + 2 * byte // BLOCK, mask=inside, other=0.0)
    even = tl.load(values + (pair >> 4)) * scale
    odd = tl.load(values + (pair & 15)) * scale
    number = first + tl.arange(0, TILE)
    found = tl.interleave(even, odd).to(ROUNDING).to(out.dtype.element_ty)
    tl.store(out + number, found, mask=number < size)


def decode_blocks(
    codes: Tensor, scales: Tensor, block_size: int, kind: str, rounding: torch.dtype, out: Tensor
) -> None:
    """:func:`.decoding.decode_blocks` of tensors on a CUDA device."""
    size = out.numel()
    values = four_bit_values(kind, codes.device)
    # float32 is no rounding: what is computed in it goes to the output's dtype at once.
    _decode[(triton.cdiv(size, _TILE),)](
        codes, scales, values, out, size, BLOCK=block_size, TILE=_TILE, ROUNDING=_TRITON_DTYPES[rounding]
    )
