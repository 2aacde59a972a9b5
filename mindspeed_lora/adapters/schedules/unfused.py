"""The base line: PEFT's Megatron layers, where each linear inside has a collective of its own and waits for it.

PEFT gives a column-parallel linear a replicated A and a column-parallel B, and a row-parallel linear a row-parallel A
and a replicated B. Under TP that is, forward and backward together, beside the base's own collectives:

======  =====================================================================
column  no SP: all-reduce of u; SP: all-gather of v, reduce-scatter of u, and v gathered again for dB
row     no SP: all-reduce of v; SP: reduce-scatter of v, all-gather of its gradient
======  =====================================================================

Plain autograd over four collectives, so that it is also what the other schedules are tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_lora.adapters.side_branch import SideBranch, flat_tokens
from mindspeed_lora.models.frozen_linear import frozen_input_product, frozen_product
from mindspeed_lora.parallel.collectives import all_reduce_sum, gather_first_dim, reduce_scatter_first_dim
from mindspeed_lora.parallel.overlap import TokenAxis
from mindspeed_lora.quantization.product import Frozen

Tensor = torch.Tensor


def begin_column(
    x: Tensor, weight: Frozen, branch: SideBranch, axis: TokenAxis, merge: bool
) -> Callable[[], Tensor]:
    """A column-parallel linear, as :func:`one_collective.begin_column`; all of it runs when it is ended."""
    return lambda: _column(x, weight, branch, axis)


def begin_row(
    x: Tensor, weight: Frozen, branch: SideBranch, axis: TokenAxis, merge: bool
) -> Callable[[], Tensor]:
    """A row-parallel linear, as :func:`one_collective.begin_row`; all of it runs when it is ended."""
    return lambda: _row(x, weight, branch, axis)


def _column(x: Tensor, weight: Frozen, branch: SideBranch, axis: TokenAxis) -> Tensor:
    if axis.cut > 1:
        whole: Tensor = _Gather.apply(x, axis.group)
    else:
        whole = _Copy.apply(x, axis.group)
    output = _Frozen.apply(whole, weight)
    added = []
    for part, lora_a in enumerate(branch.factors[::2]):
        v = _inner(branch, part, x, lora_a, axis)
        lora_b = branch.factors[2 * part + 1]
        if axis.cut > 1:
            added.append(_RegatheringColumn.apply(v, lora_b, axis.group))
        else:
            added.append(_Copy.apply(v, axis.group) @ lora_b.t())
    return _with_parts(output, added, branch)


def _row(x: Tensor, weight: Frozen, branch: SideBranch, axis: TokenAxis) -> Tensor:
    total = _Scatter if axis.cut > 1 else _Reduce
    output: Tensor = total.apply(_Frozen.apply(x, weight), axis.group)
    added = []
    for part, lora_a in enumerate(branch.factors[::2]):
        v = total.apply(_inner(branch, part, x, lora_a, axis), axis.group)
        added.append(v @ branch.factors[2 * part + 1].t())
    return _with_parts(output, added, branch)


def _inner(branch: SideBranch, part: int, x: Tensor, lora_a: Tensor, axis: TokenAxis) -> Tensor:
    """v of this rank's tokens, ``[m, r]``."""
    mask = None if branch.masks is None else branch.masks[part]
    if mask is not None and mask.size(0) > x[..., 0].numel():
        mask = mask.chunk(axis.size)[axis.rank].clone()
    v: Tensor = _Inner.apply(x, lora_a, mask, branch.parts.kept_share)
    return v


def _with_parts(output: Tensor, added: Sequence[Tensor], branch: SideBranch) -> Tensor:
    """``output [s, b, out]`` with ``s_p · added_p [s · b, rows]`` of every part on its rows."""
    for rows, scaling, more in zip(branch.parts.rows, branch.parts.scalings, added, strict=True):
        if rows.count == output.size(-1):
            output = output + scaling * more.view_as(output)
        else:
            whole = output.new_zeros(more.size(0), output.size(-1))
            places = rows.of(torch.arange(output.size(-1), device=output.device)).flatten()
            output = output + whole.index_copy(1, places, scaling * more).view_as(output)
    return output


class _Frozen(torch.autograd.Function):
    """``y = x Wᵀ`` without a gradient of W, whose input is therefore not kept: ``dx = g W``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Frozen) -> Tensor:
        ctx.weight = weight
        return frozen_product(flat_tokens(x), weight).view(*x.shape[:-1], weight.size(0))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad, weight = grad_outputs[0], ctx.weight
        return frozen_input_product(flat_tokens(grad), weight).view(*grad.shape[:-1], weight.size(1)), None


class _Inner(torch.autograd.Function):
    """``v = (mask · x / p) Aᵀ``; ``dx = mask · (u A) / p``, ``dA = uᵀ (mask · x / p)``. Saves x and the mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_a: Tensor, mask: Tensor | None, kept_share: float) -> Tensor:
        ctx.kept_share = kept_share
        ctx.save_for_backward(x, lora_a, mask)
        return _dropped(flat_tokens(x), mask, kept_share) @ lora_a.t()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, lora_a, mask = ctx.saved_tensors
        u = grad_outputs[0]
        grad_x = _dropped(u @ lora_a, mask, ctx.kept_share).view(x.shape)
        return grad_x, u.t() @ _dropped(flat_tokens(x), mask, ctx.kept_share), None, None


def _dropped(x: Tensor, mask: Tensor | None, kept_share: float) -> Tensor:
    return x if mask is None else (x * mask).div_(kept_share)


class _RegatheringColumn(torch.autograd.Function):
    """B as a column-parallel linear under SP: ``y = (AG v) Bᵀ`` of ``v [n, r]``.

    ``dv = RS(g B)``, ``dB = gᵀ (AG v)``: megatron-core keeps the local v and gathers it again.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, lora_b: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(v, lora_b)
        return gather_first_dim(v, group) @ lora_b.t()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        v, lora_b = ctx.saved_tensors
        grad = grad_outputs[0]
        grad_v = reduce_scatter_first_dim(grad @ lora_b, ctx.group)
        return grad_v, grad.t() @ gather_first_dim(v, ctx.group), None


class _Gather(torch.autograd.Function):
    """All-gather along the sequence; backward reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_first_dim(x, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_first_dim(grad_outputs[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    """Reduce-scatter along the sequence; backward all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter_first_dim(x, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return gather_first_dim(grad_outputs[0], ctx.group), None


class _Copy(torch.autograd.Function):
    """Nothing forward; backward all-reduce."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grad_outputs[0].clone(), ctx.group), None


class _Reduce(torch.autograd.Function):
    """All-reduce; backward nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce_sum(x.clone(), group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None
