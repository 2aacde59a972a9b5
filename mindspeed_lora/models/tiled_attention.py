"""Attention tile by tile, each by the device's fused kernel, merged by log-sum-exp.

Of two sets of keys with results ``o₁, o₂`` and log-sum-exps ``l₁, l₂``, both together give
``o₁ + σ(l₂ − l₁) (o₂ − o₁)`` and ``log(exp l₁ + exp l₂)``. Backward, each tile's gradients are those of the
kernel when it gets the merged result and log-sum-exp.

Inside, tensors are viewed as ``[b, n, s, d]``; their memory stays ``[s, b, n, d]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from mindspeed_lora.device.attention import flash_backward, flash_forward
from mindspeed_lora.models.attention_tiles import Tile, Visible

Tensor = torch.Tensor
_DENSE = torch.contiguous_format


def tiled_attention(query: Tensor, key: Tensor, value: Tensor, tiles: Sequence[Tile], scale: float) -> Tensor:
    """Attention of ``query [s, b, n, d]`` over ``key, value [s, b, g, d]``; returns ``[s, b, n · d]``.

    n is a multiple of g; the tiles are those of a whole row.
    """
    out: Tensor = _TiledAttention.apply(query, key, value, tiles, scale)
    return out


def dropped_attention(
    query: Tensor, key: Tensor, value: Tensor, tiles: Sequence[Tile], scale: float, dropout: float
) -> Tensor:
    """:func:`tiled_attention` with dropout of the weights, where each query is in one tile only."""
    operands = tuple(map(heads_first, (query, key, value)))
    out = torch.empty_like(query, memory_format=_DENSE)
    for tile in tiles:
        q, k, v = _cut(tile, operands)
        causal, mask = _visibility(tile, q)
        heads_first(out)[tile.rows, :, tile.queries] = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, causal, scale=scale, enable_gqa=q.size(1) != k.size(1)
        )
    return out.flatten(2)


class _TiledAttention(torch.autograd.Function):
    """``softmax(scale · q kᵀ) v`` over the tiles.

    Saves q, k, v, the result (whose memory ``linear_proj`` keeps anyway) and the log-sum-exp ``[b, n, s]``.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: Sequence[Tile], scale: float
    ) -> Tensor:
        ctx.tiles, ctx.scale = tiles, scale
        ctx.overlapping = any(tile.visible is not Visible.CAUSAL for tile in tiles)
        q, k, v = map(heads_first, (query, key, value))
        if len(tiles) == 1:
            out, lse = flash_forward(q, k, v, True, None, scale)
            out = positions_first(out).contiguous()
        else:
            result = empty_result(query) if ctx.overlapping else torch.empty_like(query, memory_format=_DENSE)
            lse = empty_lse(query)
            attend(tiles, (q, k, v), heads_first(result), lse, scale)
            out = result.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        return out.flatten(2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        tensors = [heads_first(t) for t in (grad_outputs[0].view_as(out), *inputs, out)]
        grad_out, operands, out = tensors[0], (tensors[1], tensors[2], tensors[3]), tensors[4]
        if len(ctx.tiles) == 1:
            found = flash_backward(grad_out, operands, out, lse, True, None, ctx.scale)
            return *map(positions_first, found), None, None
        if ctx.overlapping:
            grads = [torch.zeros_like(t, dtype=accumulation_dtype(t), memory_format=_DENSE) for t in inputs]
        else:
            grads = [torch.empty_like(t, memory_format=_DENSE) for t in inputs]
        views = tuple(map(heads_first, grads))
        attend_backward(ctx.tiles, grad_out, operands, out, lse, views, ctx.scale, add=ctx.overlapping)
        return *(grad.to(t.dtype) for grad, t in zip(grads, inputs, strict=True)), None, None


def heads_first(tensor: Tensor) -> Tensor:
    """``[s, b, n, d]`` as ``[b, n, s, d]``."""
    return tensor.permute(1, 2, 0, 3)


def positions_first(tensor: Tensor) -> Tensor:
    """``[b, n, s, d]`` as ``[s, b, n, d]``."""
    return tensor.permute(2, 0, 1, 3)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that sums over tiles are kept in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def empty_result(query: Tensor) -> Tensor:
    """Room for a merged result of ``query [s, b, n, d]``, of the same shape."""
    return torch.empty_like(query, dtype=accumulation_dtype(query), memory_format=_DENSE)


def empty_lse(query: Tensor) -> Tensor:
    """Room for the log-sum-exp ``[b, n, s]`` of ``query [s, b, n, d]``."""
    s, b, n, _ = query.shape
    return query.new_empty((b, n, s), dtype=accumulation_dtype(query))


def attend(
    tiles: Sequence[Tile], operands: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, scale: float
) -> None:
    """Writes the result of tiles that are own, and merges that of others, into ``out`` and ``lse``.

    Args:
        tiles: of these operands.
        operands: query ``[b, n, s, d]``, key and value ``[b, g, t, d]``.
        out: ``[b, n, s, d]``.
        lse: ``[b, n, s]``.
        scale: of the scores.
    """
    for tile in tiles:
        part, part_lse = flash_forward(*_cut(tile, operands), *_visibility(tile, operands[0]), scale)
        here, here_lse = out[tile.rows, :, tile.queries], lse[tile.rows, :, tile.queries]
        if tile.own:
            here.copy_(part)
            here_lse.copy_(part_lse)
        else:
            here.lerp_(part.to(here.dtype), torch.sigmoid(part_lse - here_lse).unsqueeze(-1))
            torch.logaddexp(here_lse, part_lse, out=here_lse)


def attend_backward(
    tiles: Sequence[Tile],
    grad_out: Tensor,
    operands: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    grads: Sequence[Tensor],
    scale: float,
    add: bool,
) -> None:
    """Writes or adds the tiles' gradients of query, key and value to ``grads``.

    Args:
        tiles: of these operands.
        grad_out: ``[b, n, s, d]``.
        operands: query ``[b, n, s, d]``, key and value ``[b, g, t, d]``.
        out: ``[b, n, s, d]`` of all tiles of the queries, here or elsewhere.
        lse: ``[b, n, s]`` likewise.
        grads: of the shapes of the operands.
        scale: of the scores.
        add: False where no key and no query is in two tiles.
    """
    for tile in tiles:
        rows = tile.rows, slice(None), tile.queries
        parts = flash_backward(
            grad_out[rows], _cut(tile, operands), out[rows], lse[rows], *_visibility(tile, out), scale
        )
        for grad, part in zip(_cut(tile, grads), parts, strict=True):
            if add:
                grad.add_(part)
            else:
                grad.copy_(part)


def _cut(tile: Tile, operands: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = operands
    return (
        query[tile.rows, :, tile.queries],
        key[tile.rows, :, tile.keys],
        value[tile.rows, :, tile.keys],
    )


def _visibility(tile: Tile, query: Tensor) -> tuple[bool, Tensor | None]:
    """The kernel's ``causal`` and ``mask``."""
    if tile.visible is not Visible.BAND:
        return tile.visible is Visible.CAUSAL, None
    assert tile.window is not None
    sizes = tile.queries.stop - tile.queries.start, tile.keys.stop - tile.keys.start
    return False, _band(*sizes, tile.shift, tile.window, query.dtype, query.device)


@lru_cache(maxsize=16)
def _band(
    queries: int, keys: int, shift: int, window: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``[s, t]``: 0 where query i, ``shift`` positions further than its number among the keys, sees key j."""
    distance = torch.arange(queries, device=device).unsqueeze(1) + shift - torch.arange(keys, device=device)
    seen = (distance >= 0) & (distance < window)
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
