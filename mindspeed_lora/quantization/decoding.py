"""Codes to numbers."""

from __future__ import annotations

import torch

from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.quantization.codebooks import four_bit_values

Tensor = torch.Tensor

_INT8_UNIT = 7.874015718698502e-3
"""bitsandbytes' 1 / 127."""


def decode(packed: Tensor, statistics: Tensor, settings: QuantSettings, out: Tensor) -> None:
    """Writes the numbers of ``packed`` (of one whole matrix) into ``out [out, in]``."""
    if settings.kind == "int8":
        out.copy_(packed * statistics.view(-1, 1) * _INT8_UNIT)
        return
    values = four_bit_values(settings.kind, packed.device)
    codes = packed.view(-1)
    numbers = torch.stack([values[(codes >> 4).int()], values[(codes & 15).int()]], dim=1).view(-1)
    scales = statistics.repeat_interleave(settings.block_size)
    n = out.numel()
    out.copy_((numbers[:n] * scales[:n]).view(out.shape))
