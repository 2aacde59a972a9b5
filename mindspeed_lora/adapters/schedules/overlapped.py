"""CCLoRA as published: the adapter's own r-wide collectives, each behind a product of the base.

The schedule of MindSpeed-LLM's ``--lora-fusion`` with dropout, parts and input gradients put right. Under SP the
products go through ``W' = W + s · B A`` where nothing is dropped ("merge"); "split" keeps the side branch apart.
``∥`` below: the collective on its left is under way while what stands on its right is computed. AG, RS, AR are
all-gather, reduce-scatter and all-reduce over TP.

Shapes: T tokens of the micro-batch, n of this rank, ``v = x Aᵀ`` and ``u = g B``, ``[T, r]`` or, of the local tokens,
``[n, r]``; g is the gradient of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mindspeed_lora.adapters.side_branch import Parts, SideBranch, flat_tokens
from mindspeed_lora.models.frozen_linear import frozen_input_product, frozen_product
from mindspeed_lora.parallel.collectives import (
    start_all_reduce,
    start_gather_first_dim,
    start_reduce_scatter_first_dim,
)
from mindspeed_lora.parallel.overlap import TokenAxis
from mindspeed_lora.quantization.product import Frozen

Tensor = torch.Tensor


def begin_column(
    x: Tensor, weight: Frozen, branch: SideBranch, axis: TokenAxis, merge: bool
) -> Callable[[], Tensor]:
    """A column-parallel linear, as :func:`one_collective.begin_column`; all of it runs when it is ended."""
    return lambda: _apply(_Column, x, weight, branch, axis, merge)


def begin_row(
    x: Tensor, weight: Frozen, branch: SideBranch, axis: TokenAxis, merge: bool
) -> Callable[[], Tensor]:
    """A row-parallel linear, as :func:`one_collective.begin_row`; all of it runs when it is ended."""
    return lambda: _apply(_Row, x, weight, branch, axis, merge)


def _apply(
    function: type[torch.autograd.Function],
    x: Tensor,
    weight: Frozen,
    branch: SideBranch,
    axis: TokenAxis,
    merge: bool,
) -> Tensor:
    masks = None if branch.masks is None else tuple(branch.masks)
    output: Tensor = function.apply(x, weight, axis, branch.parts, merge, masks, *branch.factors)
    return output


class _Column(torch.autograd.Function):
    """``linear_qkv`` and ``linear_fc1``: W ``[out/t, in]``, A ``[r, in]`` whole, B ``[rows/t, r]``.

    SP, merge  forward   AG(x) ∥ v of the local tokens, W';  y = x W'ᵀ
               backward  AG(v) ∥ u;  RS(u) ∥ g W';  RS(dx) ∥ dA (local u and x), dB
    SP, split  forward   AG(x) ∥ v of the local tokens;  AG(v) ∥ x Wᵀ;  y = x Wᵀ + s · v Bᵀ
               backward  as with merge, through W;  dx + s · u A on the local tokens
    no SP      forward   y = x Wᵀ + s · v Bᵀ or x W'ᵀ, nothing travels
               backward  AR(u) ∥ g W;  AR(g W) ∥ dA, dB;  dx = g W + s · u A (or through W')

    dB is complete; dA is a partial sum over TP with SP and complete without. Saves x and v of the local tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Frozen,
        axis: TokenAxis,
        parts: Parts,
        merge: bool,
        masks: tuple[Tensor, ...] | None,
        *factors: Tensor,
    ) -> Tensor:
        tokens = flat_tokens(x)
        if masks is not None and axis.cut > 1:
            masks = tuple(mask.chunk(axis.size)[axis.rank].clone() for mask in masks)
        branch = SideBranch(parts, factors, masks)
        arriving = _gather(tokens, axis)
        inner = branch.new_inner(tokens.size(0))
        branch.inner(tokens, inner)
        used = branch.multiplied(weight, merge)
        whole = arriving()
        inner_arriving = None if merge else _gather(torch.cat(inner, dim=1), axis)
        output = frozen_product(whole, used)
        if inner_arriving is not None:
            branch.add(output, _split(inner_arriving(), inner))
        ctx.axis, ctx.parts, ctx.merge, ctx.weight = axis, parts, merge, weight
        ctx.save_for_backward(x, *factors, *inner, *(masks or ()))
        return output.view(-1, *x.shape[1:-1], weight.size(0))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        axis: TokenAxis = ctx.axis
        x, weight, branch, inner = _unpack(ctx)
        tokens, grad = flat_tokens(x), flat_tokens(grad_outputs[0])
        inner_arriving = _gather(torch.cat(inner, dim=1), axis)
        outer = branch.outer(grad)
        whole_inner = _split(inner_arriving(), inner)
        outer_summing = _sum(torch.cat(outer, dim=1), axis)
        grad_x, summing = None, None
        if ctx.needs_input_grad[0]:
            grad_x = frozen_input_product(grad, branch.multiplied(weight, ctx.merge))
        outer = _split(outer_summing(), outer)
        if grad_x is not None:
            summing = _sum(grad_x, axis)
        gradients = branch.in_order(branch.grad_a(tokens, outer), branch.grad_b(grad, whole_inner))
        if summing is not None:
            grad_x = summing()
            if not ctx.merge:
                branch.add_input_gradient(grad_x, outer)
            grad_x = grad_x.view(x.shape)
        return grad_x, None, None, None, None, None, *gradients


class _Row(torch.autograd.Function):
    """``linear_proj`` and ``linear_fc2``: W ``[out, in/t]``, A ``[r, in/t]``, B ``[rows, r]`` whole.

    SP, merge  forward   RS(v) ∥ W';  y = RS(x W'ᵀ)
               backward  AG(g) ∥ dB (local g and v);  dx = g W';  dA
    SP, split  forward   RS(v) ∥ x Wᵀ;  RS(x Wᵀ) ∥ s · v Bᵀ of the local tokens;  the sum of both
               backward  AG(g) ∥ dB;  dx = g W + s · u A;  dA
    no SP      forward   AR(v) ∥ x Wᵀ;  AR(x Wᵀ) ∥ s · v Bᵀ;  the sum of both
               backward  dx = g W + s · u A;  dA;  dB: nothing travels

    dA is complete; dB is a partial sum over TP with SP and complete without. Saves x and the summed v.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Frozen,
        axis: TokenAxis,
        parts: Parts,
        merge: bool,
        masks: tuple[Tensor, ...] | None,
        *factors: Tensor,
    ) -> Tensor:
        tokens = flat_tokens(x)
        branch = SideBranch(parts, factors, masks)
        merge = merge and axis.cut > 1
        partial = branch.new_inner(tokens.size(0))
        branch.inner(tokens, partial)
        inner_summing = _sum(torch.cat(partial, dim=1), axis)
        if merge:
            used = branch.multiplied(weight, merge)
            inner = _split(inner_summing(), partial)
            output = _sum(frozen_product(tokens, used), axis)()
        else:
            base = frozen_product(tokens, weight)
            inner = _split(inner_summing(), partial)
            summing = _sum(base, axis)
            added = base.new_zeros(inner[0].size(0), base.size(1))
            branch.add(added, inner)
            output = summing().add_(added)
        ctx.axis, ctx.parts, ctx.merge, ctx.weight = axis, parts, merge, weight
        ctx.save_for_backward(x, *factors, *inner, *(masks or ()))
        return output.view(-1, *x.shape[1:-1], weight.size(0))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, branch, inner = _unpack(ctx)
        tokens, local = flat_tokens(x), flat_tokens(grad_outputs[0])
        arriving = _gather(local, ctx.axis)
        grad_b = branch.grad_b(local, inner)
        grad = arriving()
        outer = branch.outer(grad)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = frozen_input_product(grad, branch.multiplied(weight, ctx.merge))
            if not ctx.merge:
                branch.add_input_gradient(grad_x, outer)
            grad_x = grad_x.view(x.shape)
        gradients = branch.in_order(branch.grad_a(tokens, outer), grad_b)
        return grad_x, None, None, None, None, None, *gradients


def _unpack(ctx: Any) -> tuple[Tensor, Frozen, SideBranch, tuple[Tensor, ...]]:
    """x, W, the side branch, and v of each part."""
    parts = len(ctx.parts.rows)
    x, *rest = ctx.saved_tensors
    branch = SideBranch(ctx.parts, tuple(rest[: 2 * parts]), tuple(rest[3 * parts :]) or None)
    return x, ctx.weight, branch, tuple(rest[2 * parts : 3 * parts])


def _split(joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """``joined [m, Σ r]`` cut at the widths of ``like``."""
    return list(joined.split([tensor.size(1) for tensor in like], dim=1))


def _gather(tokens: Tensor, axis: TokenAxis) -> Callable[[], Tensor]:
    """Begins AG of ``[n, w]`` (no SP: nothing); what is returned ends it, with ``[T, w]``."""
    if axis.cut == 1:
        return lambda: tokens
    whole, work = start_gather_first_dim(tokens, axis.group)

    def finish() -> Tensor:
        work.wait()
        return whole

    return finish


def _sum(partial: Tensor, axis: TokenAxis) -> Callable[[], Tensor]:
    """Begins RS of ``[T, w]`` (no SP: AR, in place); what is returned ends it, with ``[n, w]``."""
    if axis.cut > 1:
        mine = partial.new_empty(partial.size(0) // axis.size, partial.size(1))
        wait = start_reduce_scatter_first_dim(partial, mine, axis.group)
    else:
        mine, work = partial, start_all_reduce(partial, axis.group)
        wait = (lambda: None) if work is None else work.wait

    def finish() -> Tensor:
        wait()
        return mine

    return finish
