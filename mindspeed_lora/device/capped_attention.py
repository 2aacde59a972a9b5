"""Attention whose scores are bounded by softcapping, ``c tanh(z / c)`` (Gemma 2, arXiv 2408.00118, section 2).

No fused kernel of torch has it. Queries are taken in blocks, so that the scores that are there at once stay few, and
under a causal mask a block meets only the keys that it sees. The scores are computed again in backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
_SCORES = 1 << 24
"""Most scores that are there at once."""


def capped_forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    """``softmax(cap · tanh(scale · q kᵀ / cap) + mask) v`` and the log-sum-exp of what the softmax is of.

    Args:
        query: ``[b, n, s, d]``.
        key: ``[b, g, t, d]``, n a multiple of g.
        value: ``[b, g, t, v]``.
        causal: query i sees keys 0 … i; needs ``s == t``.
        mask: ``[s, t]``, 0 or −∞, no row all −∞; not together with ``causal``.
        scale: of the scores.
        cap: their bound.

    Returns:
        ``[b, n, s, v]`` in the dtype of the query, and ``[b, n, s]`` in float32 (float64 of float64).
    """
    outs, lses = [], []
    for queries, keys, hidden in _blocks(query, key, causal, mask):
        scores = _hidden(_capped(query[:, :, queries], key[:, :, keys], scale, cap), hidden)
        lse = scores.logsumexp(dim=-1, keepdim=True)
        weights = (scores - lse).exp_().to(query.dtype)
        outs.append((weights @ value[:, :, keys].unsqueeze(2)).flatten(1, 2))
        lses.append(lse.flatten(1, 2).squeeze(-1))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def capped_backward(
    grad_out: Tensor,
    operands: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of :func:`capped_forward`.

    With P the weights and u the capped scores: ``dU = P ∘ (dO vᵀ − Σ dO ∘ O)``, ``dS = dU ∘ (1 − (u / cap)²)``,
    ``dq = scale · dS k``, ``dk = scale · dSᵀ q``, ``dv = Pᵀ dO``.

    Args:
        grad_out: ``[b, n, s, v]``.
        operands: query, key and value.
        out: ``[b, n, s, v]``, that of all keys where these are only some of them.
        lse: ``[b, n, s]``, of all keys likewise.
        causal: as in the forward pass.
        mask: as in the forward pass.
        scale: as in the forward pass.
        cap: as in the forward pass.
    """
    query, key, value = operands
    grad_queries = []
    grad_key, grad_value = (torch.zeros_like(tensor, dtype=lse.dtype) for tensor in (key, value))
    for queries, keys, hidden in _blocks(query, key, causal, mask):
        q, g = (_by_group(tensor[:, :, queries], key) for tensor in (query, grad_out))
        scores = _capped(query[:, :, queries], key[:, :, keys], scale, cap)
        slopes = 1.0 - (scores / cap).square_()
        weights = (_hidden(scores, hidden) - _by_group(lse[:, :, queries].unsqueeze(-1), key)).exp_()
        delta = (grad_out[:, :, queries].to(lse.dtype) * out[:, :, queries].to(lse.dtype)).sum(
            -1, keepdim=True
        )
        of_weights = (g @ value[:, :, keys].unsqueeze(2).transpose(-1, -2)).to(lse.dtype)
        of_scores = (
            (of_weights - _by_group(delta, key)).mul_(weights).mul_(slopes).mul_(scale).to(query.dtype)
        )
        grad_queries.append((of_scores @ key[:, :, keys].unsqueeze(2)).flatten(1, 2))
        grad_key[:, :, keys] += (of_scores.transpose(-1, -2) @ q).sum(dim=2)
        grad_value[:, :, keys] += (weights.to(query.dtype).transpose(-1, -2) @ g).sum(dim=2)
    return torch.cat(grad_queries, dim=2), grad_key.to(key.dtype), grad_value.to(value.dtype)


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
    cap: float,
    dropout: float = 0.0,
) -> Tensor:
    """What :func:`capped_forward` returns first, in plain steps that autograd follows, with dropout of the weights.

    Args:
        query: ``[b, n, s, d]``.
        key: ``[b, g, t, d]``.
        value: ``[b, g, t, v]``.
        causal: query i sees keys 0 … i + t − s.
        mask: boolean (True: is seen) or 0 and −∞, to be broadcast to ``[b, n, s, t]``.
        scale: of the scores.
        cap: their bound.
        dropout: share of the weights that are dropped.
    """
    scores = _capped(query, key, scale, cap).flatten(1, 2)
    if causal:
        new, total = scores.shape[-2:]
        mask = torch.ones(new, total, dtype=torch.bool, device=scores.device).tril_(total - new)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    weights = F.dropout(scores.softmax(dim=-1).to(query.dtype), dropout)
    return (_by_group(weights, key) @ value.unsqueeze(2)).flatten(1, 2)


def _blocks(
    query: Tensor, key: Tensor, causal: bool, mask: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Ranges of queries, the keys that one of them sees, and 0 or −∞ for each pair, or None where all are seen."""
    (b, n, s, _), t = query.shape, key.size(2)
    size = max(16, _SCORES // max(1, b * n * t))
    for first in range(0, s, size):
        queries = slice(first, min(first + size, s))
        if not causal:
            yield queries, slice(0, t), None if mask is None else mask[queries]
            continue
        rows = queries.stop - first
        hidden = query.new_full((rows, queries.stop), -torch.inf).triu_(first + 1)
        yield queries, slice(0, queries.stop), hidden


def _capped(query: Tensor, key: Tensor, scale: float, cap: float) -> Tensor:
    """``cap · tanh(scale · q kᵀ / cap)``: ``[b, g, n/g, s, t]``, at least float32."""
    scores = _by_group(query, key) @ key.unsqueeze(2).transpose(-1, -2)
    scores = scores.to(torch.promote_types(query.dtype, torch.float32))
    return torch.tanh(scores * (scale / cap)) * cap


def _hidden(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores if mask is None else scores + mask


def _by_group(tensor: Tensor, key: Tensor) -> Tensor:
    """``[b, n, …]`` as ``[b, g, n/g, …]``."""
    return tensor.unflatten(1, (key.size(1), -1))
