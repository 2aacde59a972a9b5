"""Parallel linears over a frozen weight that may be quantised: nothing but the weight as it is stored is kept.

``y = x Wᵀ``, ``dx = g W``; W has no gradient, so that neither its input nor its dequantised values wait for the
backward pass, which dequantises again. The collectives are those of megatron-core's linears
(:mod:`mindspeed_lora.parallel.overlap`).
"""

from __future__ import annotations

from typing import Any

import torch

from mindspeed_lora.parallel.overlap import TokenAxis
from mindspeed_lora.quantization.product import Frozen, input_product, product, ready

Tensor = torch.Tensor


def frozen_product(tokens: Tensor, weight: Frozen) -> Tensor:
    """``x Wᵀ``: ``[T, out]`` of ``[T, in]`` and ``[out, in]``; without autograd."""
    output = tokens.new_empty(tokens.size(0), weight.size(0))
    product(tokens, weight, output)
    return output


def frozen_input_product(grad: Tensor, weight: Frozen) -> Tensor:
    """``g W``: ``[T, in]`` of ``[T, out]`` and ``[out, in]``; without autograd."""
    output = grad.new_empty(grad.size(0), weight.size(1))
    input_product(grad, weight, output)
    return output


def frozen_column(x: Tensor, weight: Frozen, axis: TokenAxis) -> Tensor:
    """``[s, b, in]``, under SP ``[s/t, b, in]``, to ``[s, b, out/t]``, by W ``[out/t, in]``."""
    output: Tensor = _Column.apply(x, weight, axis)
    return output


def frozen_row(x: Tensor, weight: Frozen, axis: TokenAxis) -> Tensor:
    """``[s, b, in/t]`` to ``[s, b, out]``, under SP ``[s/t, b, out]``, by W ``[out, in/t]``."""
    output: Tensor = _Row.apply(x, weight, axis)
    return output


class _Column(torch.autograd.Function):
    """``y = (AG x) Wᵀ`` (no SP: x is whole); ``dx``: the reduce-scatter (no SP: all-reduce) of g W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Frozen, axis: TokenAxis) -> Tensor:
        ctx.weight, ctx.axis = weight, axis
        return _gathered(x, weight, axis, backward=False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return _summed(grad_outputs[0], ctx.weight, ctx.axis, backward=True), None, None


class _Row(torch.autograd.Function):
    """``y``: the reduce-scatter (no SP: all-reduce) of x Wᵀ; ``dx = (AG g) W`` (no SP: g is whole)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Frozen, axis: TokenAxis) -> Tensor:
        ctx.weight, ctx.axis = weight, axis
        return _summed(x, weight, axis, backward=False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(grad_outputs[0], ctx.weight, ctx.axis, backward=True), None, None


def _gathered(x: Tensor, weight: Frozen, axis: TokenAxis, backward: bool) -> Tensor:
    """The product of all tokens, ``[s, b, …]``, rows as they arrive."""
    gather = axis.gather(x.reshape(-1, x.size(-1)))
    used, multiply = ready(weight), input_product if backward else product
    output = x.new_empty(gather.num_tokens, weight.size(1 if backward else 0))
    for first, tokens in gather.pieces():
        multiply(tokens, used, output[first : first + tokens.size(0)])
    return output.view(-1, *x.shape[1:-1], output.size(1))


def _summed(x: Tensor, weight: Frozen, axis: TokenAxis, backward: bool) -> Tensor:
    """The sum over ranks of their partial products, of all tokens or, under SP, of this rank's."""
    tokens, used, multiply = x.reshape(-1, x.size(-1)), ready(weight), input_product if backward else product
    total = axis.sum(tokens.size(0), x, weight.size(1 if backward else 0))
    total.compute(lambda first, rows: multiply(tokens[first : first + rows.size(0)], used, rows))
    return total.wait().view(-1, *x.shape[1:-1], total.result.size(1))
