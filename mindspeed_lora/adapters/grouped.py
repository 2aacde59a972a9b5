"""LoRA over the stacked linears of experts: one grouped GEMM for the base, two r-wide ones for each part.

``y_i = x_i W_eᵀ + Σ_p s_p · (x_i A_peᵀ) B_peᵀ`` with e the expert of row i (LoRA, Hu et al. 2021, arXiv 2106.09685,
equation 3). Shapes, with n experts of this rank and t the ETP size:

=======  ============================  =========================
linear   A                             B
=======  ============================  =========================
fc1      ``[n, r, in]`` replicated     ``[n, rows/t, r]`` sharded
fc2      ``[n, r, in/t]`` sharded      ``[n, out, r]`` replicated
=======  ============================  =========================

A replicated factor's gradient is a partial sum over ETP (``partial_over_etp``). A pair that the experts of a layer
share is ``[r, in]`` and ``[rows, r]``; each rank's gradient of it is what its own experts and tokens add
(``shared_by_experts``). Sums are made once per optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mindspeed_lora.adapters.dropout import keep_mask, kept_share
from mindspeed_lora.adapters.side_branch import RowBlock
from mindspeed_lora.models.moe.experts import Again, GroupedLinear
from mindspeed_lora.models.moe.grouped_product import (
    add_grouped_rows,
    expert_input_products,
    expert_products,
    grouped_outer,
    grouped_rows,
)
from mindspeed_lora.quantization.product import Frozen

Tensor = torch.Tensor


class GroupedLoraPart(torch.nn.Module):
    """One pair of factors for each expert, or one for all of them.

    Args:
        num_experts: of this rank; None: the experts share the pair.
        in_features: of this rank's shard.
        rows: of this rank's shard of an expert's matrix, one block.
    """

    def __init__(
        self,
        rank: int,
        num_experts: int | None,
        in_features: int,
        rows: RowBlock,
        scaling: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        assert rows.repeats == 1, "gate and up are one block each"
        self.rows = rows
        self.scaling = scaling
        self.streams: list[int] = [0] * (num_experts or 1)
        """Set the dropout mask of each expert's A, or of the shared one, apart; from their canonical names."""
        experts = () if num_experts is None else (num_experts,)
        self.lora_a = torch.nn.Parameter(torch.empty(*experts, rank, in_features, dtype=dtype, device=device))
        self.lora_b = torch.nn.Parameter(torch.zeros(*experts, rows.count, rank, dtype=dtype, device=device))
        for factor in (self.lora_a, self.lora_b):
            marked: Any = factor
            marked.allreduce = False
            marked.shared_by_experts = num_experts is None

    @property
    def is_shared(self) -> bool:
        """Whether the experts share the pair."""
        return self.lora_a.dim() == 2

    def extra_repr(self) -> str:
        """Rank, rows and scaling, for the printed module tree."""
        shared = ", shared" if self.is_shared else ""
        rows = f"{self.rows.start}:{self.rows.stop}"
        return f"rank={self.lora_a.size(-2)}, rows={rows}, scaling={self.scaling:g}{shared}"


class GroupedLora(torch.nn.Module):
    """A frozen grouped linear and its adapter; called like the linear that it replaces.

    Args:
        base_layer: the frozen linear.
        parts: pairs of factors, for blocks of its rows.
        dropout: share of the input that each A's mask drops in training.
        column: whether ETP cuts the rows of the matrices (``linear_fc1``), otherwise their columns.
        etp_size: ranks that share an expert's matrices.
        etp_rank: this rank among them.
    """

    def __init__(
        self,
        base_layer: GroupedLinear,
        parts: Sequence[GroupedLoraPart],
        dropout: float,
        column: bool,
        etp_size: int = 1,
        etp_rank: int = 0,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.parts = torch.nn.ModuleList(parts)
        self.dropout, self.column, self.etp_rank = dropout, column, etp_rank
        for part in parts:
            replicated: Any = part.lora_a if column else part.lora_b
            replicated.partial_over_etp = etp_size > 1

    def begin(self) -> Callable[..., Tensor]:
        """What is returned is :meth:`forward`; the factors' gradients are computed when autograd comes back here."""
        parts = [part for part in self.parts if isinstance(part, GroupedLoraPart)]
        call = _Call(
            rows=[part.rows for part in parts],
            scalings=[part.scaling for part in parts],
            factors=[factor.detach() for part in parts for factor in (part.lora_a, part.lora_b)],
        )
        token: Tensor = _FactorGradients.apply(
            call, *(factor for part in parts for factor in (part.lora_a, part.lora_b))
        )
        return partial(self._run, call, token, parts)

    def forward(
        self, x: Tensor, offsets: Tensor, keys: Tensor | None = None, again: Again | None = None
    ) -> Tensor:
        """``[R, in]`` to ``[R, out]``; the arguments are those of :meth:`GroupedLinear.forward`."""
        output: Tensor = self.begin()(x, offsets, keys, again)
        return output

    def _run(
        self,
        call: _Call,
        token: Tensor,
        parts: Sequence[GroupedLoraPart],
        x: Tensor,
        offsets: Tensor,
        keys: Tensor | None = None,
        again: Again | None = None,
    ) -> Tensor:
        call.offsets, call.again = offsets, again
        if keys is not None and self.training and self.dropout > 0.0:
            call.kept_share = kept_share(self.dropout)
            call.masks = [self._mask(part, keys, offsets, x.size(1)) for part in parts]
        output: Tensor = _Products.apply(x, self.base_layer.weight, token, call)
        return output

    def _mask(self, part: GroupedLoraPart, keys: Tensor, offsets: Tensor, width: int) -> Tensor:
        """Which elements of the input ``[R, width]`` the part's As keep."""
        first = 0 if self.column else self.etp_rank * width
        streams = torch.tensor(part.streams, dtype=torch.int64, device=keys.device)
        if not part.is_shared:
            rows = torch.arange(keys.numel(), dtype=torch.int32, device=keys.device)
            streams = streams[torch.searchsorted(offsets, rows, right=True)]
        return keep_mask(keys + streams, 0, (first, first + width), self.dropout)


@dataclass
class _Call:
    """One call: what its autograd nodes share."""

    rows: list[RowBlock]
    scalings: list[float]
    factors: list[Tensor]
    """A₁ B₁ A₂ B₂ …"""
    offsets: Tensor | None = None
    again: Again | None = None
    masks: list[Tensor] | None = None
    kept_share: float = 1.0
    pending: Callable[[], list[Tensor]] | None = None
    """Computes the factors' gradients, once those of the input are on their way."""

    def kept(self, part: int, x: Tensor) -> Tensor:
        """What dropout leaves of ``x [R, in]``; :meth:`scaling` makes up for the rest."""
        return x if self.masks is None else x * self.masks[part]

    def scaling(self, part: int) -> float:
        return self.scalings[part] / self.kept_share


class _FactorGradients(torch.autograd.Function):
    """``dA_e = s · uᵀ x``, ``dB_e = s · gᵀ v`` over the rows of expert e, of what :class:`_Products` left.

    It stands where the call was begun: autograd takes the nodes that were made after that first. Its output is a token
    that ties the two together, without a value.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, *factors: Tensor) -> Tensor:
        ctx.call = call
        return factors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        assert call.pending is not None
        pending, call.pending = call.pending, None
        return None, *pending()


class _Products(torch.autograd.Function):
    """``y = x Wᵀ + Σ s · v Bᵀ`` by expert, ``v = x Aᵀ``; with ``u = g B``: ``dx = g W + Σ s · u A``.

    Saves x (for dA alone; not where it can be computed again) and v ``[R, r]``. Under dropout v is of what the mask
    keeps, and only that takes part of u A.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Frozen, token: Tensor, call: _Call) -> Tensor:
        offsets = call.offsets
        assert offsets is not None
        output = expert_products(x, weight, offsets)
        inner = []
        for part, rows in enumerate(call.rows):
            lora_a, lora_b = call.factors[2 * part : 2 * part + 2]
            v = _rows(call.kept(part, x), lora_a.mT, offsets)
            _add_rows(output[:, rows.start : rows.stop], v, lora_b.mT, offsets, call.scaling(part))
            inner.append(v)
        ctx.call, ctx.weight = call, weight
        ctx.save_for_backward(offsets, x if call.again is None else None, *inner)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        offsets, x, *inner = ctx.saved_tensors
        again, call.again = call.again, None
        grad = grad_outputs[0].contiguous()
        grads = [grad[:, rows.start : rows.stop] for rows in call.rows]
        outer = [_rows(part, call.factors[2 * i + 1], offsets) for i, part in enumerate(grads)]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = expert_input_products(grad, ctx.weight, offsets)
            for i, u in enumerate(outer):
                _add_input_gradient(grad_x, u, call, i)

        def factor_gradients() -> list[Tensor]:
            tokens = again() if again is not None else x
            found = []
            for i, (u, v) in enumerate(zip(outer, inner, strict=True)):
                lora_a = call.factors[2 * i]
                found.append(_outer(u, call.kept(i, tokens), offsets, lora_a).mul_(call.scaling(i)))
                found.append(_outer(grads[i], v, offsets, lora_a).mul_(call.scaling(i)))
            return found

        if ctx.needs_input_grad[2]:
            call.pending = factor_gradients
        return grad_x, None, torch.zeros((), dtype=grad.dtype, device=grad.device), None


def _rows(rows: Tensor, factor: Tensor, offsets: Tensor) -> Tensor:
    """``rows [R, n]`` times the factor of their expert ``[e, n, m]``, or the shared ``[n, m]``."""
    return rows @ factor if factor.dim() == 2 else grouped_rows(rows, factor, offsets)


def _add_rows(output: Tensor, rows: Tensor, factor: Tensor, offsets: Tensor, scale: float) -> None:
    if factor.dim() == 2:
        output.addmm_(rows, factor, alpha=scale)
    else:
        add_grouped_rows(output, rows, factor, offsets, scale)


def _add_input_gradient(grad_x: Tensor, outer: Tensor, call: _Call, part: int) -> None:
    assert call.offsets is not None
    lora_a, scale = call.factors[2 * part], call.scaling(part)
    if call.masks is None:
        _add_rows(grad_x, outer, lora_a, call.offsets, scale)
    else:
        grad_x.add_(_rows(outer, lora_a, call.offsets).mul_(call.masks[part]), alpha=scale)


def _outer(left: Tensor, right: Tensor, offsets: Tensor, lora_a: Tensor) -> Tensor:
    """``leftᵀ right`` by expert, or over all rows where the factors are shared."""
    return left.t() @ right if lora_a.dim() == 2 else grouped_outer(left, right, offsets)
