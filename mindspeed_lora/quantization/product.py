"""Products with a frozen weight, plain or quantised; nothing dequantised outlives them.

``y = x Wᵀ`` and ``dx = g W`` with W ``[out, in]``. A quantised W is dequantised into one buffer that all products of
a device and dtype share, at most :data:`TILE_BYTES` of its rows at a time. Products of one device run one after the
other: on CUDA all on one stream.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mindspeed_lora.quantization.shard import QuantizedWeight

Tensor = torch.Tensor
Frozen = Tensor | QuantizedWeight

TILE_BYTES = 64 << 20
"""The largest buffer; a shard that fits is dequantised whole."""

_buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def ready(weight: Frozen) -> Frozen:
    """What several products in a row take in place of ``weight``, so that it is dequantised once.

    A plain tensor, valid until the next ``ready`` or product with a quantised weight on this device; or, where the
    buffer cannot hold it, ``weight`` itself.
    """
    if isinstance(weight, QuantizedWeight) and weight.numel() * weight.element_size() <= TILE_BYTES:
        return weight.dense(out=_buffer(weight, weight.shape))
    return weight


def product(tokens: Tensor, weight: Frozen, out: Tensor) -> None:
    """``out [T, out] = tokens [T, in] Wᵀ``."""
    weight = ready(weight)
    if isinstance(weight, QuantizedWeight):
        for rows, tile in _tiles(weight):
            torch.mm(tokens, tile.t(), out=out[:, rows])
    else:
        torch.mm(tokens, weight.t(), out=out)


def input_product(grad: Tensor, weight: Frozen, out: Tensor) -> None:
    """``out [T, in] = grad [T, out] W``; the tiles of a large W are summed in float32."""
    weight = ready(weight)
    if isinstance(weight, QuantizedWeight):
        total = out.zero_() if out.dtype == torch.float32 else torch.zeros_like(out, dtype=torch.float32)
        for rows, tile in _tiles(weight):
            if total is out:
                total.addmm_(grad[:, rows], tile)
            else:
                total.add_(torch.mm(grad[:, rows], tile))
        if total is not out:
            out.copy_(total)
    else:
        torch.mm(grad, weight, out=out)


def _tiles(weight: QuantizedWeight) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a matrix that is larger than the buffer, dequantised in turn."""
    height, width = weight.shape
    step = max(1, TILE_BYTES // (width * weight.element_size()))
    for first in range(0, height, step):
        rows = slice(first, min(first + step, height))
        yield rows, weight.dense(rows, _buffer(weight, (rows.stop - first, width)))


def _buffer(weight: QuantizedWeight, shape: tuple[int, ...]) -> Tensor:
    """The beginning of the buffer for weights like this one."""
    key, size = (weight.device, weight.dtype), torch.Size(shape).numel()
    buffer = _buffers.get(key)
    if buffer is None or buffer.numel() < size:
        _buffers.pop(key, None)
        buffer = _buffers[key] = torch.empty(size, dtype=weight.dtype, device=weight.device)
    return buffer[:size].view(shape)
