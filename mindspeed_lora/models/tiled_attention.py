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
from mindspeed_lora.device.capped_attention import capped_attention
from mindspeed_lora.device.causal_blocks import blocks_are_faster, blocks_backward, blocks_forward
from mindspeed_lora.models.attention_tiles import Tile, Visible

Tensor = torch.Tensor
_DENSE = torch.contiguous_format


def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, tiles: Sequence[Tile], scale: float, cap: float | None = None
) -> Tensor:
    """Attention of ``query [s, b, n, d]`` over ``key [s, b, g, d]`` and ``value [s, b, g, v]``: ``[s, b, n · v]``.

    n is a multiple of g; the tiles are those of a whole row; ``cap`` bounds the scores.
    """
    squares = cap is None and all(tile.visible is Visible.CAUSAL for tile in tiles)
    out: Tensor
    if squares:
        out = _SquareAttention.apply(query, key, value, tiles, scale)
    else:
        out = _MergedAttention.apply(query, key, value, tiles, scale, cap)
    return out


def dropped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: Sequence[Tile],
    scale: float,
    dropout: float,
    cap: float | None = None,
) -> Tensor:
    """:func:`tiled_attention` with dropout of the weights, where each query is in one tile only."""
    operands = tuple(map(heads_first, (query, key, value)))
    out = empty_result(query, value, query.dtype)
    for tile in tiles:
        q, k, v = _cut(tile, operands)
        causal, mask = _visibility(tile, q)
        if cap is not None:
            dropped = capped_attention(q, k, v, causal, mask, scale, cap, dropout)
            heads_first(out)[tile.rows, :, tile.queries] = dropped
            continue
        heads_first(out)[tile.rows, :, tile.queries] = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, causal, scale=scale, enable_gqa=q.size(1) != k.size(1)
        )
    return out.flatten(2)


class _SquareAttention(torch.autograd.Function):
    """``softmax(scale · q kᵀ) v`` where every query and key is in one tile, a causal square.

    Saves q, k, v, the result (whose memory ``linear_proj`` keeps anyway) and the log-sum-exp ``[b, n, s]``.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: Sequence[Tile], scale: float
    ) -> Tensor:
        ctx.tiles, ctx.scale = tiles, scale
        out, lse = empty_result(query, value, query.dtype), empty_lse(query)
        operands, result = tuple(map(heads_first, (query, key, value))), heads_first(out)
        for tile in tiles:
            q, k, v = _cut(tile, operands)
            here = tile.rows, slice(None), tile.queries
            if blocks_are_faster(q):
                blocks_forward(q, k, v, scale, result[here])
            else:
                part, lse[here] = flash_forward(q, k, v, True, None, scale)
                result[here] = part
        ctx.save_for_backward(query, key, value, out, lse)
        return out.flatten(2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        grads = [torch.empty_like(tensor, memory_format=_DENSE) for tensor in inputs]
        grad_out, result = heads_first(grad_outputs[0].view_as(out)), heads_first(out)
        operands, views = tuple(map(heads_first, inputs)), tuple(map(heads_first, grads))
        for tile in ctx.tiles:
            here = tile.rows, slice(None), tile.queries
            cut, grads_here = _cut(tile, operands), _cut(tile, views)
            if blocks_are_faster(cut[0]):
                blocks_backward(grad_out[here], cut, result[here], ctx.scale, grads_here)
                continue
            parts = flash_backward(grad_out[here], cut, result[here], lse[here], True, None, ctx.scale)
            for grad, part in zip(grads_here, parts, strict=True):
                grad.copy_(part)
        return *grads, None, None


class _MergedAttention(torch.autograd.Function):
    """``softmax(scale · q kᵀ) v`` over tiles of any kind.

    Saves q, k, v, the result and the log-sum-exp ``[b, n, s]``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tiles: Sequence[Tile],
        scale: float,
        cap: float | None,
    ) -> Tensor:
        ctx.tiles, ctx.scores = tiles, (scale, cap)
        result, lse = empty_result(query, value, accumulation_dtype(query)), empty_lse(query)
        operands = heads_first(query), heads_first(key), heads_first(value)
        attend(tiles, operands, heads_first(result), lse, scale, cap)
        out = result.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        return out.flatten(2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grads = [
            torch.zeros_like(tensor, dtype=accumulation_dtype(tensor), memory_format=_DENSE)
            for tensor in (query, key, value)
        ]
        operands = heads_first(query), heads_first(key), heads_first(value)
        views = [heads_first(grad) for grad in grads]
        grad_out, result = heads_first(grad_outputs[0].view_as(out)), heads_first(out)
        attend_backward(ctx.tiles, grad_out, operands, result, lse, views, *ctx.scores)
        return *(grad.to(query.dtype) for grad in grads), None, None, None


def heads_first(tensor: Tensor) -> Tensor:
    """``[s, b, n, d]`` as ``[b, n, s, d]``."""
    return tensor.permute(1, 2, 0, 3)


def positions_first(tensor: Tensor) -> Tensor:
    """``[b, n, s, d]`` as ``[s, b, n, d]``."""
    return tensor.permute(2, 0, 1, 3)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that sums over tiles are kept in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def empty_result(query: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the result ``[s, b, n, v]`` of ``query [s, b, n, d]`` and ``value [t, b, g, v]``."""
    return query.new_empty((*query.shape[:3], value.size(-1)), dtype=dtype)


def empty_lse(query: Tensor) -> Tensor:
    """Room for the log-sum-exp ``[b, n, s]`` of ``query [s, b, n, d]``."""
    s, b, n, _ = query.shape
    return query.new_empty((b, n, s), dtype=accumulation_dtype(query))


def attend(
    tiles: Sequence[Tile],
    operands: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
    cap: float | None = None,
) -> None:
    """Writes the result of tiles that are own, and merges that of others, into ``out`` and ``lse``.

    Args:
        tiles: of these operands.
        operands: query ``[b, n, s, d]``, key ``[b, g, t, d]``, value ``[b, g, t, v]``.
        out: ``[b, n, s, v]``.
        lse: ``[b, n, s]``.
        scale: of the scores.
        cap: their bound, if any.
    """
    for tile in tiles:
        part, part_lse = flash_forward(*_cut(tile, operands), *_visibility(tile, operands[0]), scale, cap)
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
    cap: float | None = None,
) -> None:
    """Adds the tiles' gradients of query, key and value to ``grads``.

    Args:
        tiles: of these operands.
        grad_out: ``[b, n, s, v]``.
        operands: query ``[b, n, s, d]``, key ``[b, g, t, d]``, value ``[b, g, t, v]``.
        out: ``[b, n, s, v]`` of all tiles of the queries, here or elsewhere.
        lse: ``[b, n, s]`` likewise.
        grads: of the shapes of the operands.
        scale: of the scores.
        cap: their bound, if any.
    """
    for tile in tiles:
        rows = tile.rows, slice(None), tile.queries
        parts = flash_backward(
            grad_out[rows], _cut(tile, operands), out[rows], lse[rows], *_visibility(tile, out), scale, cap
        )
        for grad, part in zip(_cut(tile, grads), parts, strict=True):
            grad.add_(part)


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
