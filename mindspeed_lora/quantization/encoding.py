"""Numbers to codes: four bits in blocks, eight bits in rows."""

from __future__ import annotations

import torch

from mindspeed_lora.quantization.codebooks import four_bit_bounds, four_bit_codes

Tensor = torch.Tensor

_SMALLEST = 1e-38
"""A magnitude below this is taken for it where it divides."""


def encode_four_bits(numbers: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Of ``numbers [n]`` the codes, uint8 ``[ceil(n / 2), 1]``, and magnitudes, float32 ``[ceil(n / block)]``."""
    numbers = numbers.float()
    whole = numbers.numel() // block_size * block_size
    blocks = numbers[:whole].view(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * absmax.clamp(min=_SMALLEST).reciprocal().unsqueeze(1)).view(-1)
    if whole < numbers.numel():
        last = numbers[whole:].abs().amax().clamp(min=_SMALLEST)
        absmax = torch.cat([absmax, last.unsqueeze(0)])
        scaled = torch.cat([scaled, numbers[whole:] / last])
    scaled = torch.nn.functional.pad(scaled, (0, scaled.numel() % 2))
    order = torch.tensor(four_bit_codes(kind), dtype=torch.uint8)
    codes = order[torch.bucketize(scaled, four_bit_bounds(kind))]
    return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1), absmax


def encode_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``int8 [out, in]`` and magnitudes ``float32 [out]`` of ``matrix [out, in]``."""
    absmax = matrix.abs().amax(1).float()
    scaled = torch.round(matrix * (absmax.reciprocal() * 127.0).unsqueeze(1))
    return scaled.nan_to_num_(nan=0.0).to(torch.int8), absmax
