"""Causal attention of one row on the CPU: blocks of queries over all keys that they see, by whole matrix products.

torch's fused kernel also cuts the keys and keeps running sums; its products are small, and its backward pass shares
out whole heads to the threads. With the weights of a block in the cache, larger products are faster for rows of
some hundred positions (measured with 9 and 3 heads of 64: 10 to 35% of forward and backward together at 180 to 1500
positions on one and two threads), slower for short ones and for those whose weights leave the cache.

Letters: g groups of m query heads that share a key/value head, s positions, d width of a head; a block has B queries
and sees t keys.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

Tensor = torch.Tensor

_SHORTEST, _LONGEST = 128, 2048
_MEDIUM = 768
"""Up to here blocks are half as high, and half as large in all."""
_QUERIES = 128
_WEIGHTS = 1 << 18
"""Weights of a block, for as many groups as fit: 1 MiB in float32."""


def blocks_are_faster(query: Tensor) -> bool:
    """Whether these functions are for the ``[b, n, s, d]`` queries of a causal square."""
    whole = query.dtype in (torch.float32, torch.float64)
    return query.device.type == "cpu" and whole and _SHORTEST <= query.size(2) <= _LONGEST


def blocks_forward(query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor) -> None:
    """Writes ``softmax(scale · q kᵀ) v``, query i seeing keys 0 … i, to ``out``.

    Args:
        query: ``[b, n, s, d]``.
        key: ``[b, g, s, d]``, n a multiple of g.
        value: ``[b, g, s, d]``.
        scale: of the scores.
        out: ``[b, n, s, d]``.
    """
    sizes = _sizes(query, key)
    room = _room(query, sizes)
    for row in range(query.size(0)):
        grouped, result = _by_group(query[row], sizes), _by_group(out[row], sizes)
        for block in _blocks(sizes):
            q, k, v = block.queries(grouped), block.keys(key[row]), block.keys(value[row])
            weights = _weights(q, k, scale, block, block.place(room))
            block.write(torch.bmm(weights, v), result)


def blocks_backward(
    grad_out: Tensor,
    operands: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes the gradients of query, key and value of :func:`blocks_forward`, whose weights it computes again.

    With P the weights: ``dS = scale · P ∘ (dO vᵀ − Σ dO ∘ O)``, ``dq = dS k``, ``dk = dSᵀ q``, ``dv = Pᵀ dO``.

    Args:
        grad_out: ``[b, n, s, d]``.
        operands: query, key and value.
        out: ``[b, n, s, d]``.
        scale: of the scores.
        grads: of the shapes of the operands.
    """
    query, key, value = operands
    sizes = _sizes(query, key)
    delta = (grad_out * out).sum(dim=-1, keepdim=True)
    room, room_for_slopes = _room(query, sizes), _room(query, sizes)
    for row in range(query.size(0)):
        grouped = [_by_group(tensor[row], sizes) for tensor in (query, grad_out, delta, grads[0])]
        grad_key, grad_value = (torch.zeros_like(key[row], memory_format=_DENSE) for _ in range(2))
        for block in _blocks(sizes):
            q, g, block_delta = (block.queries(tensor) for tensor in grouped[:3])
            k, v = block.keys(key[row]), block.keys(value[row])
            weights = _weights(q, k, scale, block, block.place(room))
            slopes = torch.bmm(g, v.transpose(1, 2), out=block.place(room_for_slopes))
            slopes.sub_(block_delta).mul_(weights)
            block.write(_scaled(slopes, k, scale, torch.empty_like(q)), grouped[3])
            block.keys(grad_key).add_(torch.bmm(slopes.transpose(1, 2), q), alpha=scale)
            block.keys(grad_value).add_(torch.bmm(weights.transpose(1, 2), g))
        grads[1][row].copy_(grad_key)
        grads[2][row].copy_(grad_value)


_DENSE = torch.contiguous_format
_Sizes = tuple[int, int, int]
"""g, m and s."""


class _Block(NamedTuple):
    """Queries ``first`` … ``last`` − 1 of some groups, and the keys that they see."""

    groups: slice
    first: int
    last: int
    num_groups: int
    """Groups g'."""
    height: int
    """Rows m · B of its weights in each group."""

    def queries(self, rows: Tensor) -> Tensor:
        """``[g, m, s, …]`` of its queries, as ``[g', m · B, …]`` in memory of its own."""
        return rows[self.groups, :, self.first : self.last].flatten(1, 2)

    def keys(self, rows: Tensor) -> Tensor:
        """``[g, s, d]`` of the keys that it sees, ``[g', t, d]``."""
        return rows[self.groups, : self.last]

    def write(self, values: Tensor, rows: Tensor) -> None:
        """Puts ``[g', m · B, d]`` to their places in ``[g, m, s, d]``."""
        part = rows[self.groups, :, self.first : self.last]
        part.copy_(values.view(part.shape))

    def place(self, room: Tensor) -> Tensor:
        """Memory for its weights ``[g', m · B, t]``."""
        return room[: self.num_groups * self.height * self.last].view(self.num_groups, self.height, self.last)


@lru_cache(maxsize=256)
def _blocks(sizes: _Sizes) -> tuple[_Block, ...]:
    groups, heads, length = sizes
    queries, weights = (_QUERIES, _WEIGHTS) if length > _MEDIUM else (_QUERIES // 2, _WEIGHTS // 2)
    blocks = []
    for first in range(0, length, queries):
        last = min(length, first + queries)
        height = heads * (last - first)
        together = min(groups, max(1, weights // (height * last)))
        for start in range(0, groups, together):
            stop = min(groups, start + together)
            blocks.append(_Block(slice(start, stop), first, last, stop - start, height))
    return tuple(blocks)


def _sizes(query: Tensor, key: Tensor) -> _Sizes:
    groups = key.size(1)
    return groups, query.size(1) // groups, query.size(2)


def _room(query: Tensor, sizes: _Sizes) -> Tensor:
    """Memory for the weights of the largest block."""
    return query.new_empty(max(block.num_groups * block.height * block.last for block in _blocks(sizes)))


def _by_group(row: Tensor, sizes: _Sizes) -> Tensor:
    """``[n, s, …]`` as ``[g, m, s, …]``."""
    return row.view(*sizes, row.size(-1))


def _scaled(left: Tensor, right: Tensor, scale: float, out: Tensor) -> Tensor:
    """``scale · left right`` of batches of matrices, in ``out``."""
    return torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)


def _weights(query: Tensor, key: Tensor, scale: float, block: _Block, place: Tensor) -> Tensor:
    """The softmax ``[g', m · B, t]`` of a block; the last B keys are those of its queries."""
    _scaled(query, key.transpose(1, 2), scale, place)
    queries = block.last - block.first
    by_head = place.view(block.num_groups, -1, queries, block.last)
    by_head[..., block.first :].add_(_unseen(queries, place.dtype))
    return torch.softmax(place, dim=-1, out=place)


@lru_cache(maxsize=256)
def _unseen(queries: int, dtype: torch.dtype) -> Tensor:
    """``[B, B]``: −∞ for the keys after a query, else 0."""
    return torch.full((queries, queries), -torch.inf, dtype=dtype).triu_(1)
