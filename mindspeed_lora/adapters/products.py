"""The products of a frozen linear with its adapter, and the collectives between them, as autograd Functions.

The adapter's part is added to the base's partial result before the one collective that the base needs anyway, and
the gradient of a replicated factor stays a partial sum over TP until the optimizer step. Per micro-batch, forward
and backward together, a layer then runs the base's own collectives, and under SP one r-wide reduce-scatter.

Shapes: T tokens of the micro-batch (whole sequence), t the TP size, g the gradient of the output, ``u = s · g B``
``[T, r]``, ``v = x Aᵀ`` ``[T, r]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_lora.parallel.collectives import (
    all_reduce_sum,
    gather_first_dim,
    reduce_scatter_first_dim,
    start_all_reduce,
)

Tensor = torch.Tensor


@dataclass(frozen=True)
class RowBlock:
    """Rows of this rank's shard of the base matrix that a part adds to: a block that may repeat.

    Rows ``[start + i · stride, stop + i · stride)`` for i < ``repeats``, in this order. Megatron interleaves q, k
    and v by query group, so that each of them is a block that repeats once per group of this rank; gate and up are
    one block each.
    """

    start: int
    stop: int
    repeats: int = 1
    stride: int = 0

    @property
    def count(self) -> int:
        """Number of rows in all."""
        return self.repeats * (self.stop - self.start)

    def of(self, output: Tensor) -> Tensor:
        """The view ``[…, repeats, stop − start]`` of these rows in ``output […, out]``."""
        width, stride = self.stop - self.start, max(self.stride, self.stop - self.start)
        reach = (self.repeats - 1) * stride + width
        return output.narrow(-1, self.start, reach).unfold(-1, width, stride)


@dataclass(frozen=True)
class Layout:
    """What the products of one linear need to know beside tensors."""

    tp_group: dist.ProcessGroup
    tp_size: int
    tp_rank: int
    sequence_parallel: bool
    rows: tuple[RowBlock, ...]
    """Of each part."""
    scalings: tuple[float, ...]
    """Of each part."""
    kept_share: float
    """Probability with which dropout keeps an element of the adapter's input; what it keeps is divided by it."""


def column_products(
    x: Tensor, weight: Tensor, layout: Layout, masks: list[Tensor] | None, factors: Sequence[Tensor]
) -> Tensor:
    """``x Wᵀ + Σ s · (x Aᵀ) Bᵀ`` of a column-parallel linear, ``[s, b, out/t]``.

    Args:
        x: ``[s, b, in]``, under SP ``[s/t, b, in]``.
        weight: W ``[out/t, in]``, frozen.
        layout: groups, and rows and scaling of each part.
        masks: per part, which elements of the whole sequence's input dropout keeps, bool ``[T, in]``.
        factors: A₁ B₁ A₂ B₂ …
    """
    output: Tensor = _ColumnProducts.apply(x, weight, layout, masks, *factors)
    return output


def row_products(
    x: Tensor, weight: Tensor, layout: Layout, masks: list[Tensor] | None, factors: Sequence[Tensor]
) -> Tensor:
    """The same of a row-parallel linear, ``[s, b, out]``, under SP ``[s/t, b, out]``.

    x is ``[s, b, in/t]``, W ``[out, in/t]``.
    """
    output: Tensor = _RowProducts.apply(x, weight, layout, masks, *factors)
    return output


class _ColumnProducts(torch.autograd.Function):
    """``linear_qkv`` and ``linear_fc1``: W ``[out/t, in]``, A ``[r, in]`` whole, B ``[rows/t, r]``.

    forward   y = x Wᵀ + s · v Bᵀ on the whole sequence (SP: all-gather of x first)
    dx        no SP: all-reduce of g W + u A, while dA and dB are computed
              SP: reduce-scatter of g W, plus (reduce-scatter of u) A on the local tokens
    dA        uᵀ x of the local tokens: a partial sum over TP
    dB        s · gᵀ v, complete

    Saves this rank's x (for dA alone) and v of the whole sequence, so that backward gathers nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, layout: Layout, masks: list[Tensor] | None, *factors: Tensor
    ) -> Tensor:
        whole = gather_first_dim(x, layout.tp_group) if layout.sequence_parallel else x
        tokens = whole.reshape(-1, whole.size(-1))
        output = tokens @ weight.t()
        inner = _add_adapter(output, tokens, layout, masks, factors)
        if masks is not None and layout.sequence_parallel:
            masks = [mask.chunk(layout.tp_size)[layout.tp_rank] for mask in masks]
        ctx.layout = layout
        ctx.save_for_backward(x, weight, *factors, *inner, *(masks or ()))
        return output.view(*whole.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        x, weight, factors, inner, masks = _unpack(ctx)
        grad = grad_outputs[0].reshape(-1, grad_outputs[0].size(-1))
        outer = _outer_gradients(grad, layout, factors)
        grad_x, handle = None, None
        if layout.sequence_parallel:
            outer = _split(reduce_scatter_first_dim(torch.cat(outer, dim=1), layout.tp_group), outer)
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            if layout.sequence_parallel:
                grad_x = reduce_scatter_first_dim(grad_x, layout.tp_group)
            _add_input_gradient(grad_x, outer, layout, masks, factors)
            if not layout.sequence_parallel:
                handle = start_all_reduce(grad_x, layout.tp_group)
            grad_x = grad_x.view(x.shape)
        factor_grads = _factor_gradients(grad, x.reshape(-1, x.size(-1)), outer, inner, layout, masks)
        if handle is not None:
            handle.wait()
        return grad_x, None, None, None, *factor_grads


class _RowProducts(torch.autograd.Function):
    """``linear_proj`` and ``linear_fc2``: W ``[out, in/t]``, A ``[r, in/t]``, B ``[rows, r]`` whole.

    forward   all-reduce (SP: reduce-scatter) of x Wᵀ + s · v Bᵀ, v being this rank's partial sum
    dx        g W + u A, no communication (SP: all-gather of g first, which serves all)
    dA        uᵀ x, complete
    dB        s · gᵀ v: a partial sum over TP

    Saves x (for dA alone) and v.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, layout: Layout, masks: list[Tensor] | None, *factors: Tensor
    ) -> Tensor:
        tokens = x.reshape(-1, x.size(-1))
        output = tokens @ weight.t()
        inner = _add_adapter(output, tokens, layout, masks, factors)
        ctx.layout = layout
        ctx.save_for_backward(x, weight, *factors, *inner, *(masks or ()))
        output = output.view(*x.shape[:-1], -1)
        if layout.sequence_parallel:
            return reduce_scatter_first_dim(output, layout.tp_group)
        return all_reduce_sum(output, layout.tp_group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        x, weight, factors, inner, masks = _unpack(ctx)
        grad = grad_outputs[0]
        if layout.sequence_parallel:
            grad = gather_first_dim(grad, layout.tp_group)
        grad = grad.reshape(-1, grad.size(-1))
        outer = _outer_gradients(grad, layout, factors)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            _add_input_gradient(grad_x, outer, layout, masks, factors)
            grad_x = grad_x.view(x.shape)
        factor_grads = _factor_gradients(grad, x.reshape(-1, x.size(-1)), outer, inner, layout, masks)
        return grad_x, None, None, None, *factor_grads


Saved = tuple[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor] | None]


def _unpack(ctx: Any) -> Saved:
    """x, W, the factors A₁ B₁ A₂ B₂ …, v of each part, and with dropout the mask of each."""
    parts = len(ctx.layout.rows)
    x, weight, *rest = ctx.saved_tensors
    return x, weight, rest[: 2 * parts], rest[2 * parts : 3 * parts], rest[3 * parts :] or None


def _add_adapter(
    output: Tensor, tokens: Tensor, layout: Layout, masks: Sequence[Tensor] | None, factors: Sequence[Tensor]
) -> list[Tensor]:
    """Adds ``s · v Bᵀ`` of every part to ``output [T, out]`` in place; returns every v ``[T, r]``.

    With dropout ``v = (mask · x) Aᵀ``, and s is divided by the share that is kept.
    """
    inner = []
    for part, rows in enumerate(layout.rows):
        lora_a, lora_b = factors[2 * part], factors[2 * part + 1]
        kept = tokens if masks is None else tokens * masks[part]
        inner.append(kept @ lora_a.t())
        scaling = _scaling(layout, part, masks)
        if rows.repeats == 1:
            output[:, rows.start : rows.stop].addmm_(inner[-1], lora_b.t(), alpha=scaling)
        else:
            added = (inner[-1] @ lora_b.t()).unflatten(-1, (rows.repeats, -1))
            rows.of(output).add_(added, alpha=scaling)
    return inner


def _outer_gradients(grad: Tensor, layout: Layout, factors: Sequence[Tensor]) -> list[Tensor]:
    """``g B`` ``[T, r]`` of every part, not scaled, for ``grad [T, out]``."""
    return [_rows(grad, rows) @ factors[2 * part + 1] for part, rows in enumerate(layout.rows)]


def _add_input_gradient(
    grad_x: Tensor,
    outer: Sequence[Tensor],
    layout: Layout,
    masks: Sequence[Tensor] | None,
    factors: Sequence[Tensor],
) -> None:
    """Adds ``u A`` (with dropout only where the mask keeps) of every part to ``grad_x [T, in]`` in place."""
    for part, grad_inner in enumerate(outer):
        scaling = _scaling(layout, part, masks)
        if masks is None:
            grad_x.addmm_(grad_inner, factors[2 * part], alpha=scaling)
        else:
            grad_x.add_((grad_inner @ factors[2 * part]).mul_(masks[part]), alpha=scaling)


def _factor_gradients(
    grad: Tensor,
    tokens: Tensor,
    outer: Sequence[Tensor],
    inner: Sequence[Tensor],
    layout: Layout,
    masks: Sequence[Tensor] | None,
) -> list[Tensor]:
    """``dA = uᵀ x`` and ``dB = s · gᵀ v`` of every part, in the order of the factors."""
    gradients = []
    for part, rows in enumerate(layout.rows):
        scaling = _scaling(layout, part, masks)
        kept = tokens if masks is None else tokens * masks[part]
        gradients.append((outer[part].t() @ kept).mul_(scaling))
        gradients.append((_rows(grad, rows).t() @ inner[part]).mul_(scaling))
    return gradients


def _scaling(layout: Layout, part: int, masks: Sequence[Tensor] | None) -> float:
    return layout.scalings[part] / (1.0 if masks is None else layout.kept_share)


def _rows(grad: Tensor, rows: RowBlock) -> Tensor:
    """The rows' columns of ``grad [T, out]``: ``[T, rows.count]``."""
    if rows.repeats == 1:
        return grad[:, rows.start : rows.stop]
    return rows.of(grad).flatten(-2)


def _split(joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """``joined [T, Σ r]`` cut at the widths of ``like``."""
    return list(joined.split([tensor.size(1) for tensor in like], dim=1))
