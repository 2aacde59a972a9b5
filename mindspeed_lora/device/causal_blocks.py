"""Causal attention of one row on the CPU: blocks of queries over all keys that they see, by whole matrix products.

torch's fused kernel also cuts the keys and keeps running sums; its products are small, and its backward pass shares
out whole heads to the threads. With the weights of a block in the cache, larger products are faster for rows of
some hundred positions (measured with heads of 64, forward and backward together, on one and two threads: 9 heads in
3 groups 10 to 30% at 180 to 2048 positions, 32 in 8 groups 30 to 40% at 180 and 512), slower for short ones and for
those whose weights leave the cache.

Letters: g groups of m query heads that share a key/value head, s positions, d width of a head, v that of a
value. The library computes
a batch of products with one thread each, so that three groups would take two threads as long as four: queries of a
group are dealt to c parts, position p to part p mod c, and g · c is a multiple of the threads. Each part has
``S = ⌈s / c⌉`` positions; those that are too many are zeros, which add nothing to any gradient. A block has the
queries of B positions and sees t keys.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd, prod
from typing import NamedTuple

import torch

Tensor = torch.Tensor

_SHORTEST, _LONGEST = 128, 2048
_POSITIONS = 64
"""B, cut to a multiple of the parts."""
_WEIGHTS = 1 << 20
"""Weights of a block, for as many groups as fit: 4 MiB in float32."""
_MOST_PARTS = 4
"""Where the threads would need more of them, groups stay whole: products of a few rows gain nothing."""


def blocks_are_faster(query: Tensor) -> bool:
    """Whether these functions are for the ``[b, n, s, d]`` queries of a causal square."""
    whole = query.dtype in (torch.float32, torch.float64)
    return query.device.type == "cpu" and whole and _SHORTEST <= query.size(2) <= _LONGEST


def blocks_forward(query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor) -> None:
    """Writes ``softmax(scale · q kᵀ) v``, query i seeing keys 0 … i, to ``out``.

    Args:
        query: ``[b, n, s, d]``.
        key: ``[b, g, s, d]``, n a multiple of g.
        value: ``[b, g, s, v]``.
        scale: of the scores.
        out: ``[b, n, s, v]``.
    """
    sizes = _sizes(query, key)
    room = _room(query, sizes)
    for row in range(query.size(0)):
        q, k, v = sizes.deal(query[row]), sizes.repeat(key[row]), sizes.repeat(value[row])
        result = q.new_empty(*q.shape[:2], v.size(-1))
        for block in _blocks(sizes):
            weights = _weights(block.queries(q), block.keys(k), scale, block, block.place(room), sizes)
            block.queries(result).copy_(torch.bmm(weights, block.keys(v)))
        sizes.collect(result, out[row])


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
        grad_out: ``[b, n, s, v]``.
        operands: query, key and value.
        out: ``[b, n, s, v]``.
        scale: of the scores.
        grads: of the shapes of the operands.
    """
    query, key, value = operands
    sizes = _sizes(query, key)
    delta = (grad_out * out).sum(dim=-1, keepdim=True)
    room, room_for_slopes = _room(query, sizes), _room(query, sizes)
    for row in range(query.size(0)):
        q, g, dealt_delta = (sizes.deal(tensor[row]) for tensor in (query, grad_out, delta))
        k, v = sizes.repeat(key[row]), sizes.repeat(value[row])
        grad_query = torch.empty_like(q)
        grad_key, grad_value = (tensor.new_zeros(tensor.shape) for tensor in (k, v))
        for block in _blocks(sizes):
            weights = _weights(block.queries(q), block.keys(k), scale, block, block.place(room), sizes)
            grad = block.queries(g)
            slopes = torch.bmm(grad, block.keys(v).transpose(1, 2), out=block.place(room_for_slopes))
            slopes.sub_(block.queries(dealt_delta)).mul_(weights)
            rows = block.queries(grad_query)
            rows.copy_(_scaled(slopes, block.keys(k), scale, torch.empty_like(rows)))
            block.keys(grad_key).add_(torch.bmm(slopes.transpose(1, 2), block.queries(q)), alpha=scale)
            block.keys(grad_value).add_(torch.bmm(weights.transpose(1, 2), grad))
        sizes.collect(grad_query, grads[0][row])
        sizes.add_up(grad_key, grads[1][row])
        sizes.add_up(grad_value, grads[2][row])


class _Sizes(NamedTuple):
    """How the queries of one row are dealt."""

    groups: int
    heads: int
    """m, of a group."""
    length: int
    """s."""
    parts: int
    """c, of a group."""

    def deal(self, row: Tensor) -> Tensor:
        """``[n, s, …]`` as ``[g · c, S · m, …]``, in memory of its own."""
        groups, heads, length, parts = self
        whole, rest = divmod(length, parts)
        by_position = row.unflatten(0, (groups, heads)).transpose(1, 2)
        dealt = row.new_empty(groups, parts, whole + (rest > 0), heads, row.size(-1))
        turns = dealt.transpose(1, 2)
        turns[:, :whole].copy_(by_position[:, : whole * parts].unflatten(1, (whole, parts)))
        if rest:
            turns[:, whole, :rest] = by_position[:, whole * parts :]
            turns[:, whole, rest:] = 0
        return dealt.view(groups * parts, -1, row.size(-1))

    def collect(self, dealt: Tensor, row: Tensor) -> None:
        """Writes what is dealt back to ``row [n, s, …]``."""
        groups, heads, length, parts = self
        whole, rest = divmod(length, parts)
        by_position = row.unflatten(0, (groups, heads)).transpose(1, 2)
        turns = dealt.view(groups, parts, -1, heads, row.size(-1)).transpose(1, 2)
        by_position[:, : whole * parts].unflatten(1, (whole, parts)).copy_(turns[:, :whole])
        if rest:
            by_position[:, whole * parts :] = turns[:, whole, :rest]

    def repeat(self, row: Tensor) -> Tensor:
        """``[g, s, d]`` as ``[g · c, s, d]``."""
        return row if self.parts == 1 else row.repeat_interleave(self.parts, dim=0)

    def add_up(self, repeated: Tensor, row: Tensor) -> None:
        """Writes the sum over the parts of ``[g · c, s, d]`` to ``row [g, s, d]``."""
        torch.sum(repeated.unflatten(0, (self.groups, self.parts)), dim=1, out=row)


class _Block(NamedTuple):
    """The queries of positions ``first`` … ``last`` − 1 in some parts, and the keys that they see."""

    batch: slice
    """Of the g · c parts."""
    rows: slice
    """Of the S · m queries of each part."""
    first: int
    last: int

    def queries(self, dealt: Tensor) -> Tensor:
        """Its rows of ``[g · c, S · m, …]``."""
        return dealt[self.batch, self.rows]

    def keys(self, repeated: Tensor) -> Tensor:
        """The keys of ``[g · c, s, d]`` that it sees."""
        return repeated[self.batch, : self.last]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of its weights."""
        return self.batch.stop - self.batch.start, self.rows.stop - self.rows.start, self.last

    def place(self, room: Tensor) -> Tensor:
        """Memory for its weights."""
        return room[: prod(self.shape)].view(self.shape)


@lru_cache(maxsize=256)
def _blocks(sizes: _Sizes) -> tuple[_Block, ...]:
    groups, heads, length, parts = sizes
    positions = _POSITIONS // parts * parts
    blocks = []
    for first in range(0, length, positions):
        last = min(length, first + positions)
        rows = slice(first // parts * heads, -(-last // parts) * heads)
        fitting = max(1, _WEIGHTS // ((rows.stop - rows.start) * last * parts))
        for start in range(0, groups, fitting):
            stop = min(groups, start + fitting)
            blocks.append(_Block(slice(start * parts, stop * parts), rows, first, last))
    return tuple(blocks)


def _sizes(query: Tensor, key: Tensor) -> _Sizes:
    groups, threads = key.size(1), torch.get_num_threads()
    parts = threads // gcd(groups, threads)
    return _Sizes(groups, query.size(1) // groups, query.size(2), parts if parts <= _MOST_PARTS else 1)


def _room(query: Tensor, sizes: _Sizes) -> Tensor:
    """Memory for the weights of the largest block."""
    return query.new_empty(max(prod(block.shape) for block in _blocks(sizes)))


def _scaled(left: Tensor, right: Tensor, scale: float, out: Tensor) -> Tensor:
    """``scale · left right`` of batches of matrices, in ``out``."""
    return torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)


def _weights(query: Tensor, key: Tensor, scale: float, block: _Block, place: Tensor, sizes: _Sizes) -> Tensor:
    """The softmax of a block; the last B keys are those of its positions."""
    _scaled(query, key.transpose(1, 2), scale, place)
    by_part = place.unflatten(0, (-1, sizes.parts))
    by_part[..., block.first :].add_(_unseen(block.last - block.first, sizes.heads, sizes.parts, place.dtype))
    return torch.softmax(place, dim=-1, out=place)


@lru_cache(maxsize=256)
def _unseen(positions: int, heads: int, parts: int, dtype: torch.dtype) -> Tensor:
    """``[c, ⌈B/c⌉ · m, B]``: −∞ for the keys after a query, else 0."""
    turns = -(-positions // parts)
    query = torch.arange(turns * parts).view(turns, parts).t().repeat_interleave(heads, dim=1)
    later = torch.arange(positions) > query.unsqueeze(-1)
    return torch.zeros(later.shape, dtype=dtype).masked_fill_(later, -torch.inf)
