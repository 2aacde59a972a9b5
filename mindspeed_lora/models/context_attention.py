"""Attention over rows whose positions are cut over ranks.

Ulysses (Jacobs et al. 2023, arXiv 2309.14509): an all-to-all gives each rank all positions of some heads, another
takes the result back. Ring attention (Liu et al. 2023, arXiv 2310.01889): keys and values go around, and each rank
merges what its queries find in them. Both together: the ring's places are Ulysses groups.

Letters: u ranks of the Ulysses group, r places of the ring, s positions that this rank holds, n query heads, g
key/value heads, d the width of a query and key, v that of a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mindspeed_lora.models.attention_tiles import SubRows, Tile, attention_tiles
from mindspeed_lora.models.tiled_attention import (
    accumulation_dtype,
    attend,
    attend_backward,
    empty_lse,
    empty_result,
    heads_first,
)
from mindspeed_lora.parallel.collectives import RingPass, all_to_all
from mindspeed_lora.parallel.context import ContextParallel

Tensor = torch.Tensor


def heads_for_positions(
    query: Tensor, key: Tensor, value: Tensor, context: ContextParallel
) -> tuple[Tensor, Tensor, Tensor]:
    """All positions of this rank's share of the heads.

    Args:
        query: ``[s, b, n, d]``, n a multiple of u.
        key: ``[s, b, g, d]``, g a multiple of u, or u of g: each head then goes to u/g ranks.
        value: ``[s, b, g, v]``.
        context: the ranks.

    Returns:
        ``[u · s, b, n/u, d]``, ``[u · s, b, max(g/u, 1), d]`` and ``[u · s, b, max(g/u, 1), v]``.
    """
    if context.ulysses_size == 1:
        return query, key, value
    shared: tuple[Tensor, Tensor, Tensor] = _HeadsForPositions.apply(query, key, value, context)
    return shared


def positions_for_heads(attended: Tensor, context: ContextParallel) -> Tensor:
    """``[u · s, b, n/u · v]`` to ``[s, b, n · v]``: what :func:`heads_for_positions` did, taken back."""
    if context.ulysses_size == 1:
        return attended
    own: Tensor = _PositionsForHeads.apply(attended, context)
    return own


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: ContextParallel,
    sub_rows: SubRows | None,
    window: int | None,
    scale: float,
    cap: float | None = None,
) -> Tensor:
    """Causal attention of this place's positions over those of all places.

    Args:
        query: ``[s, b, n, d]``: the place's two chunks.
        key: ``[s, b, g, d]``, n a multiple of g.
        value: ``[s, b, g, v]``.
        context: the ring.
        sub_rows: of each whole row the lengths of its sub-rows, which attention does not cross.
        window: position i sees positions i − window + 1 … i.
        scale: of the scores.
        cap: their bound, if any.

    Returns:
        ``[s, b, n · v]``.
    """
    whole = query.size(0) * context.ring_size
    held = [context.chunks(whole, place) for place in range(context.ring_size)]
    own = held[context.ring_rank]
    tiles = [attention_tiles(query.size(1), sub_rows, own, keys, window) for keys in held]
    out: Tensor = _RingAttention.apply(query, key, value, context, tiles, scale, cap)
    return out


class _HeadsForPositions(torch.autograd.Function):
    """Forward: one all-to-all of query, key and value, of each rank's heads one behind the other; backward: its dual.

    A head that went to several ranks gets the sum of their gradients. Nothing is saved.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, context: ContextParallel
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.context, ctx.groups = context, key.size(2)
        parts = [_shares(tensor, context.ulysses_size) for tensor in (query, key, value)]
        ctx.heads = [part.shape[3:] for part in parts]
        received = _exchange(torch.cat([part.flatten(3) for part in parts], dim=3), context)
        query, key, value = _of_heads(received.flatten(0, 1), ctx.heads)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        size = ctx.context.ulysses_size
        grads = torch.cat([grad.flatten(2) for grad in grad_outputs], dim=2).unflatten(0, (size, -1))
        query, key, value = _of_heads(_exchange(grads, ctx.context), ctx.heads)
        key, value = (_sum_of_copies(grad, size // ctx.groups) for grad in (key, value))
        return _joined(query), _joined(key), _joined(value), None


class _PositionsForHeads(torch.autograd.Function):
    """Forward and backward: one all-to-all of ``[u, s, b, n/u · v]``. Nothing is saved."""

    @staticmethod
    def forward(ctx: Any, attended: Tensor, context: ContextParallel) -> Tensor:
        ctx.context = context
        received = _exchange(attended.unflatten(0, (context.ulysses_size, -1)), context)
        return _joined(received)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _exchange(_shares(grad_outputs[0], ctx.context.ulysses_size), ctx.context).flatten(0, 1), None


def _exchange(tensor: Tensor, context: ContextParallel) -> Tensor:
    assert context.ulysses_group is not None
    return all_to_all(tensor, context.ulysses_group)


def _shares(tensor: Tensor, size: int) -> Tensor:
    """``[s, b, n, …]`` as ``[u, s, b, n/u, …]``, rank by rank; of fewer heads than ranks each is repeated."""
    heads = tensor.size(2)
    if heads < size:
        tensor = tensor.repeat_interleave(size // heads, dim=2)
    return tensor.unflatten(2, (size, -1)).movedim(2, 0)


def _of_heads(joined: Tensor, heads: Sequence[tuple[int, int]]) -> list[Tensor]:
    """``[…, Σ n d]`` as one ``[…, n, d]`` after the other, for these numbers of heads and their widths."""
    parts = joined.split([number * width for number, width in heads], dim=-1)
    return [part.unflatten(-1, size) for part, size in zip(parts, heads, strict=True)]


def _sum_of_copies(grads: Tensor, copies: int) -> Tensor:
    """``[u, s, b, 1, d]`` summed over the ranks that had the same head, where there are several of them."""
    return grads.unflatten(0, (-1, copies)).sum(dim=1) if copies > 1 else grads


def _joined(tensor: Tensor) -> Tensor:
    """``[u, s, b, n/u, …]`` as ``[s, b, n, …]``."""
    return tensor.movedim(0, 2).flatten(2, 3)


class _RingAttention(torch.autograd.Function):
    """``softmax(scale · q kᵀ) v``, the keys and values of place i − t at step t on place i.

    At each step the next keys and values come while tiles are computed. Backward they go around once more, and the
    sum of a block's gradients after it, one place behind; at the end it comes home. Saved: the place's own q, k, v,
    the result and the log-sum-exp; never those of another place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: ContextParallel,
        tiles: list[tuple[Tile, ...]],
        scale: float,
        cap: float | None,
    ) -> Tensor:
        ctx.context, ctx.tiles, ctx.scores = context, tiles, (scale, cap)
        result, lse = empty_result(query, value, accumulation_dtype(query)), empty_lse(query)
        for place, block in _passing(_joint(key, value), context):
            keys, values = _apart(block, key, value)
            operands = heads_first(query), heads_first(keys), heads_first(values)
            attend(tiles[place], operands, heads_first(result), lse, scale, cap)
        out = result.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        return out.flatten(2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        q, grad_out, result = (heads_first(t) for t in (query, grad_outputs[0].view_as(out), out))
        dtype = accumulation_dtype(query)
        grad_query = torch.zeros_like(query, dtype=dtype, memory_format=torch.contiguous_format)
        sums: RingPass | None = None
        for place, block in _passing(_joint(key, value), ctx.context):
            grads = torch.zeros_like(block, dtype=dtype)
            keys, values = _apart(block, key, value)
            operands = q, heads_first(keys), heads_first(values)
            views = [heads_first(grad) for grad in (grad_query, *_apart(grads, key, value))]
            attend_backward(ctx.tiles[place], grad_out, operands, result, lse, views, *ctx.scores)
            if sums is not None:
                grads += sums.wait()
            sums = RingPass(grads, ctx.context.ring_group, tag=1)
        assert sums is not None
        grad_key, grad_value = _apart(sums.wait().to(query.dtype), key, value)
        return grad_query.to(query.dtype), grad_key, grad_value, None, None, None, None


def _joint(key: Tensor, value: Tensor) -> Tensor:
    """Keys ``[s, b, g, d]``, then values ``[s, b, g, v]``, in one piece of memory."""
    return torch.cat((key.reshape(-1), value.reshape(-1)))


def _apart(block: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`_joint` put together, in these shapes."""
    keys, values = block.split((key.numel(), value.numel()))
    return keys.view(key.shape), values.view(value.shape)


def _passing(own: Tensor, context: ContextParallel) -> Iterator[tuple[int, Tensor]]:
    """Every place and its keys and values (:func:`_joint`), this one first; the next come while one is used."""
    assert context.ring_group is not None
    block = own
    for step in range(context.ring_size):
        last = step + 1 == context.ring_size
        coming = None if last else RingPass(block, context.ring_group)
        yield (context.ring_rank - step) % context.ring_size, block
        if coming is not None:
            block = coming.wait()
