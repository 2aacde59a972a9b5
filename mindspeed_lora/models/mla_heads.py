"""The heads of multi-latent attention out of its projections, the rotated part of query and key by their positions.

Letters: n heads of this rank, d features of a query or key without position and e rotated ones, v of a value. The
rotated features stand behind the others, and end half of the width apart in query and key alike, however the
projections lay them: a permutation of both leaves their product as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from mindspeed_lora.models.rotation import rotate_into

Tensor = torch.Tensor


def rotate_query(query: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    """Heads ``[s, b, n, d + e]`` with their last e features rotated.

    Args:
        query: ``[s, b, n, d + e]``.
        cos: ``[s, b or 1, 1, e/2]``.
        sin: likewise.
        pairs: the features that are rotated together are neighbours in ``query``.
    """
    rotated: Tensor = _RotateQuery.apply(query, cos, sin, pairs)
    return rotated


def keys_and_values(
    key_value: Tensor, shared: Tensor, width: int, cos: Tensor, sin: Tensor, pairs: bool
) -> tuple[Tensor, Tensor]:
    """Key ``[s, b, n, d + e]`` and value ``[s, b, n, v]``.

    Args:
        key_value: ``[s, b, n, d + v]``: per head its key without position, then its value.
        shared: ``[s, b, e]``, which is rotated and given to every head.
        width: d.
        cos: ``[s, b or 1, 1, e/2]``.
        sin: likewise.
        pairs: the features that are rotated together are neighbours in ``shared``.
    """
    key, value = _KeysAndValues.apply(key_value, shared, width, cos, sin, pairs)
    return key, value


class _RotateQuery(torch.autograd.Function):
    """Saves cosine and sine, which all layers share."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
        ctx.pairs = pairs
        ctx.save_for_backward(cos, sin)
        plain = query.size(-1) - 2 * cos.size(-1)
        out = query.new_empty(query.shape)
        out[..., :plain] = query[..., :plain]
        rotate_into(out[..., plain:], query[..., plain:], cos, sin, 1.0, from_pairs=pairs)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_out,), (cos, sin) = grad_outputs, ctx.saved_tensors
        plain = grad_out.size(-1) - 2 * cos.size(-1)
        grad = grad_out.new_empty(grad_out.shape)
        grad[..., :plain] = grad_out[..., :plain]
        rotate_into(grad[..., plain:], grad_out[..., plain:], cos, sin, -1.0, to_pairs=ctx.pairs)
        return grad, None, None, None


class _KeysAndValues(torch.autograd.Function):
    """The shared features get the sum of what the heads of this rank send back. Saves cosine and sine."""

    @staticmethod
    def forward(
        ctx: Any, key_value: Tensor, shared: Tensor, width: int, cos: Tensor, sin: Tensor, pairs: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.pairs, ctx.width = pairs, width
        ctx.save_for_backward(cos, sin)
        rotated = shared.new_empty(*shared.shape[:2], 1, shared.size(-1))
        rotate_into(rotated, shared.unsqueeze(2), cos, sin, 1.0, from_pairs=pairs)
        key = key_value.new_empty(*key_value.shape[:3], width + shared.size(-1))
        key[..., :width] = key_value[..., :width]
        key[..., width:] = rotated
        return key, key_value[..., width:].contiguous()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_key, grad_value), (cos, sin), width = grad_outputs, ctx.saved_tensors, ctx.width
        grad = grad_key.new_empty(*grad_key.shape[:3], width + grad_value.size(-1))
        grad[..., :width] = grad_key[..., :width]
        grad[..., width:] = grad_value
        summed = grad_key[..., width:].sum(dim=2, keepdim=True)
        grad_shared = torch.empty_like(summed)
        rotate_into(grad_shared, summed, cos, sin, -1.0, to_pairs=ctx.pairs)
        return grad, grad_shared.squeeze(2), None, None, None, None
