"""The adapter's part is added to the base's partial result before the one collective that the base needs anyway.

The gradient of a replicated factor stays a partial sum over TP until the optimizer step. Per micro-batch, forward
and backward together, a layer then runs the base's own collectives, and under SP one r-wide reduce-scatter a column
linear. Each collective travels in chunks while the products of others are computed; between its start and its end a
caller may do something else (:func:`begin_column`, :func:`begin_row`), forward and, since autograd goes back the
same way, backward.

Shapes: T tokens of the micro-batch (whole sequence), n of this rank (SP: T/t, else T), ``v = x Aᵀ`` and ``u = g B``
``[T, r]``, g the gradient of the output. With merged weights ``W' = W + s · B A`` stands for W and the added terms
are left out; W' is formed again in backward rather than kept. A quantised W is dequantised again in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mindspeed_lora.adapters.side_branch import Parts, SideBranch, flat_tokens
from mindspeed_lora.parallel.collectives import start_reduce_scatter_first_dim
from mindspeed_lora.parallel.overlap import TokenAxis, TokenGather, TokenSum
from mindspeed_lora.quantization.product import Frozen, input_product, product

Tensor = torch.Tensor


class _Call:
    """What the autograd Functions of one call share, and hand to each other while it travels."""

    def __init__(self, axis: TokenAxis, parts: Parts, merge: bool) -> None:
        self.axis, self.parts, self.merge = axis, parts, merge
        self.gather: TokenGather | None = None
        self.sum: TokenSum | None = None
        self.finish_input_gradient: Callable[[], Tensor] | None = None

    def take_gather(self) -> TokenGather:
        """The gather under way; it is dropped here, and its memory with it."""
        gather, self.gather = self.gather, None
        assert gather is not None
        return gather

    def take_sum(self) -> TokenSum:
        """The sum of the output, in the same way: nothing else needs it until the backward pass is over."""
        total, self.sum = self.sum, None
        assert total is not None
        return total

    def take_input_gradient(self) -> Callable[[], Tensor]:
        """What ends the sum of the input's gradient, in the same way."""
        finish, self.finish_input_gradient = self.finish_input_gradient, None
        assert finish is not None
        return finish

    def branch(self, factors: tuple[Tensor, ...], masks: tuple[Tensor, ...] | None) -> SideBranch:
        return SideBranch(self.parts, factors, masks)


def begin_column(
    x: Tensor, weight: Frozen, branch: SideBranch, axis: TokenAxis, merge: bool
) -> Callable[[], Tensor]:
    """Starts a column-parallel linear; what is returned ends it, with ``[s, b, out/t]``.

    Args:
        x: ``[s, b, in]``, under SP ``[s/t, b, in]``.
        weight: W ``[out/t, in]``, frozen, plain or quantised.
        branch: A ``[r, in]`` whole, B ``[rows/t, r]``, masks of the whole sequence.
        axis: the tokens' group and chunks.
        merge: multiply by ``W + s · B A``.
    """
    call = _Call(axis, branch.parts, merge)
    if axis.size == 1:
        call.gather = axis.gather(flat_tokens(x))
    else:
        x = _StartGather.apply(x, call)
    masks = None if branch.masks is None else tuple(branch.masks)

    def finish() -> Tensor:
        output: Tensor = _ColumnProducts.apply(x, weight, call, masks, *branch.factors)
        return output

    return finish


def begin_row(
    x: Tensor, weight: Frozen, branch: SideBranch, axis: TokenAxis, merge: bool
) -> Callable[[], Tensor]:
    """The same of a row-parallel linear, with ``[s, b, out]``, under SP ``[s/t, b, out]``.

    x is ``[s, b, in/t]``, W ``[out, in/t]``, A ``[r, in/t]``, B ``[rows, r]`` whole.
    """
    call = _Call(axis, branch.parts, merge)
    masks = None if branch.masks is None else tuple(branch.masks)
    partial: Tensor = _RowProducts.apply(x, weight, call, masks, *branch.factors)
    if axis.size == 1:
        call.take_sum()

    def finish() -> Tensor:
        output: Tensor = partial if axis.size == 1 else _FinishSum.apply(partial, call)
        return output

    return finish


class _StartGather(torch.autograd.Function):
    """forward   starts the all-gather of x (no SP: nothing)
    backward  ends the reduce-scatter (no SP: all-reduce) of the input's gradient
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        call.gather = call.axis.gather(flat_tokens(x))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.call.take_input_gradient()().view_as(grad_outputs[0]), None


class _FinishSum(torch.autograd.Function):
    """forward   ends the reduce-scatter (no SP: all-reduce) of the output
    backward  starts the all-gather of the output's gradient (no SP: nothing)
    """

    @staticmethod
    def forward(ctx: Any, partial: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        return call.take_sum().wait().view_as(partial)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        ctx.call.gather = ctx.call.axis.gather(flat_tokens(grad_outputs[0]))
        return grad_outputs[0], None


class _ColumnProducts(torch.autograd.Function):
    """``linear_qkv`` and ``linear_fc1``: W ``[out/t, in]``, A ``[r, in]`` whole, B ``[rows/t, r]``.

    forward   y = x Wᵀ + s · v Bᵀ, rows of tokens as they arrive
    dx        no SP: the sum of g W + s · u A, sent off chunk by chunk
              SP: the scattered sum of g W, plus s · (reduce-scattered u) A on the local tokens
    dA        s · uᵀ x of the local tokens: a partial sum over TP
    dB        s · gᵀ v, complete

    Saves this rank's x (for dA alone) and v of the whole sequence, so that backward gathers nothing. dB is computed
    while dx travels; u, r wide, travels behind g W.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Frozen, call: _Call, masks: tuple[Tensor, ...] | None, *factors: Tensor
    ) -> Tensor:
        gather, branch = call.take_gather(), call.branch(factors, masks)
        inner = branch.new_inner(gather.num_tokens)
        output = x.new_empty(gather.num_tokens, weight.size(0))
        used = branch.multiplied(weight, call.merge)
        for first, tokens in gather.pieces():
            rows = output[first : first + tokens.size(0)]
            product(tokens, used, rows)
            branch.inner(tokens, inner, first)
            if not call.merge:
                branch.add(rows, inner, first)
        if masks is not None and call.axis.cut > 1:
            masks = tuple(mask.chunk(call.axis.size)[call.axis.rank].clone() for mask in masks)
        ctx.call, ctx.weight = call, weight
        ctx.save_for_backward(x, *factors, *inner, *(masks or ()))
        return output.view(-1, *x.shape[1:-1], weight.size(0))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        cut = call.axis.cut > 1
        x, weight, branch, inner = _unpack(ctx)
        grad = flat_tokens(grad_outputs[0])
        outer = branch.outer(grad)
        scattering = _start_scatter(outer, call.axis) if cut else None
        dx = None
        if ctx.needs_input_grad[0]:
            used = branch.multiplied(weight, call.merge)

            def rows_of_dx(first: int, rows: Tensor) -> None:
                some = slice(first, first + rows.size(0))
                input_product(grad[some], used, rows)
                if not call.merge and not cut:
                    branch.add_input_gradient(rows, [u[some] for u in outer], first)

            dx = call.axis.sum(grad.size(0), grad, weight.size(1))
            dx.compute(rows_of_dx)
        grad_b = branch.grad_b(grad, inner)
        local = outer if scattering is None else scattering()
        gradients = branch.in_order(branch.grad_a(flat_tokens(x), local), grad_b)
        if dx is None:
            return None, None, None, None, *gradients
        call.finish_input_gradient = _finish(dx, branch, local if cut and not call.merge else None)
        if call.axis.size == 1:
            call.take_input_gradient()()
        return dx.result.view(x.shape), None, None, None, *gradients


class _RowProducts(torch.autograd.Function):
    """``linear_proj`` and ``linear_fc2``: W ``[out, in/t]``, A ``[r, in/t]``, B ``[rows, r]`` whole.

    forward   the sum (SP: scattered) of x Wᵀ + s · v Bᵀ, sent off chunk by chunk; v is this rank's partial sum
    dx        g W + s · u A, rows of tokens as g arrives (no SP: it is there)
    dA        s · uᵀ x, complete
    dB        s · gᵀ v: a partial sum over TP

    Saves x (for dA alone) and v.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Frozen, call: _Call, masks: tuple[Tensor, ...] | None, *factors: Tensor
    ) -> Tensor:
        branch, tokens = call.branch(factors, masks), flat_tokens(x)
        inner = branch.new_inner(tokens.size(0))
        used = branch.multiplied(weight, call.merge)

        def rows_of_y(first: int, rows: Tensor) -> None:
            some = tokens[first : first + rows.size(0)]
            product(some, used, rows)
            branch.inner(some, inner, first)
            if not call.merge:
                branch.add(rows, inner, first)

        call.sum = call.axis.sum(tokens.size(0), x, weight.size(0))
        call.sum.compute(rows_of_y)
        ctx.call, ctx.weight = call, weight
        ctx.save_for_backward(x, *factors, *inner, *(masks or ()))
        return call.sum.result.view(-1, *x.shape[1:-1], weight.size(0))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        x, weight, branch, inner = _unpack(ctx)
        tokens = flat_tokens(x)
        gather = call.take_gather() if call.axis.size > 1 else call.axis.gather(flat_tokens(grad_outputs[0]))
        outer = branch.new_inner(tokens.size(0))
        grad_x = torch.empty_like(tokens) if ctx.needs_input_grad[0] else None
        used = weight if grad_x is None else branch.multiplied(weight, call.merge)
        grad_b: list[Tensor] = []
        for first, grad in gather.pieces():
            some = slice(first, first + grad.size(0))
            for all_rows, u in zip(outer, branch.outer(grad), strict=True):
                all_rows[some] = u
            if grad_x is not None:
                input_product(grad, used, grad_x[some])
                if not call.merge:
                    branch.add_input_gradient(grad_x[some], [u[some] for u in outer], first)
            more = branch.grad_b(grad, [v[some] for v in inner])
            grad_b = [total.add_(part) for total, part in zip(grad_b, more, strict=True)] if grad_b else more
        gradients = branch.in_order(branch.grad_a(tokens, outer), grad_b)
        return None if grad_x is None else grad_x.view(x.shape), None, None, None, *gradients


def _unpack(ctx: Any) -> tuple[Tensor, Frozen, SideBranch, tuple[Tensor, ...]]:
    """x, W, the side branch, and v of each part."""
    parts = len(ctx.call.parts.rows)
    x, *rest = ctx.saved_tensors
    masks = tuple(rest[3 * parts :]) or None
    return x, ctx.weight, ctx.call.branch(tuple(rest[: 2 * parts]), masks), tuple(rest[2 * parts : 3 * parts])


def _start_scatter(outer: list[Tensor], axis: TokenAxis) -> Callable[[], list[Tensor]]:
    """Begins to sum every u over the ranks; what is returned ends it, with this rank's tokens ``[n, r]`` of each."""
    joined = torch.cat(outer, dim=1)
    mine = joined.new_empty(joined.size(0) // axis.size, joined.size(1))
    finish = start_reduce_scatter_first_dim(joined, mine, axis.group)

    def split() -> list[Tensor]:
        finish()
        return list(mine.split([u.size(1) for u in outer], dim=1))

    return split


def _finish(dx: TokenSum, branch: SideBranch, outer: list[Tensor] | None) -> Callable[[], Tensor]:
    """Ends the sum of dx, and adds the local ``s · u A`` where it is not in it."""

    def finish() -> Tensor:
        result = dx.wait()
        if outer is not None:
            branch.add_input_gradient(result, outer)
        return result

    return finish
