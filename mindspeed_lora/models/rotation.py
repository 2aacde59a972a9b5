"""Query, key and value out of the fused projection, query and key rotated by their positions.

Rotated halves (RoFormer, Su et al. 2021, arXiv 2104.09864, equation 34): with x = (x₁, x₂) the two halves of a
head, ``(x₁ cos − x₂ sin, x₂ cos + x₁ sin)``. A rotation by the opposite angle takes the gradient back.
"""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool = False) -> Tensor:
    """Heads ``[s, b, n, d]`` rotated by angles whose ``cos, sin [s, b or 1, 1, d/2]`` are given.

    What is rotated together are the halves of a head, or neighbours (``pairs``).
    """
    rotated: Tensor = _Rotate.apply(x, cos, sin, pairs)
    return rotated


def split_and_rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, pairs: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Query ``[s, b, g · m, d]``, key and value ``[s, b, g, d]``, query and key rotated.

    Args:
        qkv: ``[s, b, g, m + 2, d]``: per query group its m query heads, then key, then value.
        cos: ``[s, b or 1, 1, d/2]``.
        sin: ″
        pairs: neighbours are rotated together, not the halves of a head.
    """
    query, key, value = _SplitAndRotate.apply(qkv, cos, sin, pairs)
    return query, key, value


def rotate_into(
    out: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    sign: float,
    from_pairs: bool = False,
    to_pairs: bool = False,
) -> None:
    """Writes x ``[…, d]`` rotated by ``sign`` times the angle to ``out``, which is other memory.

    Where cosine and sine are of fewer features than half of the head, what lies behind those is left as it is.

    The two features that are rotated together lie half of the width apart, or beside each other (``from_pairs`` in x,
    ``to_pairs`` in ``out``).
    """
    width = 2 * cos.size(-1)
    if width < x.size(-1):
        out[..., width:].copy_(x[..., width:])
        out, x = out[..., :width], x[..., :width]
    x1, x2 = _both(x, from_pairs)
    out1, out2 = _both(out, to_pairs)
    torch.mul(x1, cos, out=out1)
    out1.addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=out2)
    out2.addcmul_(x1, sin, value=sign)


def _both(x: Tensor, pairs: bool) -> tuple[Tensor, Tensor]:
    """The first and the second of all the features that are rotated together."""
    if pairs:
        return x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second


class _Rotate(torch.autograd.Function):
    """Saves cosine and sine, which all layers share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.pairs = pairs
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rotate_into(out, x, cos, sin, 1.0, pairs, pairs)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        grad = torch.empty(grad_outputs[0].shape, dtype=grad_outputs[0].dtype, device=grad_outputs[0].device)
        rotate_into(grad, grad_outputs[0], cos, sin, -1.0, ctx.pairs, ctx.pairs)
        return grad, None, None, None


class _SplitAndRotate(torch.autograd.Function):
    """One pass from the fused projection to what attention reads, and one back.

    The projection's output is not kept: attention saves query, key and value, and the three gradients are written
    to their places in one ``[s, b, g, m + 2, d]``.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, pairs: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        s, b, groups, heads, width = qkv.shape
        ctx.save_for_backward(cos, sin)
        ctx.pairs = pairs
        query = qkv.new_empty(s, b, groups, heads - 2, width)
        key = qkv.new_empty(s, b, groups, width)
        rotate_into(query, qkv[:, :, :, :-2], cos.unsqueeze(2), sin.unsqueeze(2), 1.0, pairs, pairs)
        rotate_into(key, qkv[:, :, :, -2], cos, sin, 1.0, pairs, pairs)
        return query.view(s, b, groups * (heads - 2), width), key, qkv[:, :, :, -1].clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        pairs = ctx.pairs
        grad_query, grad_key, grad_value = grad_outputs
        s, b, groups, width = grad_key.shape
        grad = grad_key.new_empty(s, b, groups, grad_query.size(2) // groups + 2, width)
        grad_query = grad_query.reshape(s, b, groups, -1, width)
        rotate_into(grad[:, :, :, :-2], grad_query, cos.unsqueeze(2), sin.unsqueeze(2), -1.0, pairs, pairs)
        rotate_into(grad[:, :, :, -2], grad_key, cos, sin, -1.0, pairs, pairs)
        grad[:, :, :, -1] = grad_value
        return grad, None, None, None
