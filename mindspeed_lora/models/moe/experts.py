"""A rank's experts: their matrices stacked, their products grouped.

``y = w · fc2(silu(gate) · up)``, gate above up in ``fc1``; the choice's weight w multiplies the activation, as in
megatron-core, so that it need not wait for the output and the output need not be kept for its gradient. Under ETP an
expert's inner width f is cut: ``fc1 [e, 2f/etp, h]``, ``fc2 [e, h, f/etp]``, and the output is a partial sum.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from mindspeed_lora.config.shape import MoEShape
from mindspeed_lora.models.moe.dispatch import ExpertRows
from mindspeed_lora.models.moe.grouped_product import expert_input_products, expert_products, grouped_outer
from mindspeed_lora.parallel.experts import ExpertParallel
from mindspeed_lora.quantization.product import Frozen

Tensor = torch.Tensor
Again = Callable[[], Tensor]
"""Computes a linear's input again, for the backward pass."""


class GroupedLinear(torch.nn.Module):
    """``weight [e, out, in]``: this rank's part of one linear of each of its experts.

    A linear is begun before its input is there, like one with an adapter (:mod:`mindspeed_lora.adapters.grouped`).
    """

    def __init__(self, num_experts: int, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(num_experts, out_features, in_features, dtype=dtype))
        weight: Any = self.weight
        # megatron-core then reduces its gradient over the ranks that hold the same experts.
        weight.allreduce = False

    def begin(self) -> Callable[..., Tensor]:
        """:meth:`forward`."""
        return self.forward

    def forward(
        self, x: Tensor, offsets: Tensor, keys: Tensor | None = None, again: Again | None = None
    ) -> Tensor:
        """``[R, in]`` to ``[R, out]``.

        Args:
            x: ordered by expert.
            offsets: ``[e]`` int32, where the rows of each expert end.
            keys: ``[R]`` of the adapter's dropout; there is none here.
            again: computes x again, which is then not kept.
        """
        output: Tensor = _GroupedProduct.apply(x, self.weight, offsets, again)
        return output

    def extra_repr(self) -> str:
        """Experts and sizes, for the printed module tree."""
        experts, out_features, in_features = self.weight.shape
        return f"experts={experts}, in_features={in_features}, out_features={out_features}"


class _GroupedProduct(torch.autograd.Function):
    """``y_i = x_i W_eᵀ``, e the expert of row i; ``dx = g W_e``, ``dW_e = gᵀ x`` over its rows.

    The input is kept for dW alone, which a frozen weight does not have. A quantised one is dequantised again in
    backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Frozen, offsets: Tensor, again: Again | None) -> Tensor:
        ctx.again, ctx.weight = again, weight
        keep = weight.requires_grad and again is None
        ctx.save_for_backward(offsets, x if keep else None)
        return expert_products(x, weight, offsets)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        offsets, x = ctx.saved_tensors
        again, ctx.again = ctx.again, None
        grad = grad_outputs[0].contiguous()
        grad_x = expert_input_products(grad, ctx.weight, offsets) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grouped_outer(grad, again() if x is None else x, offsets)
        return grad_x, grad_weight, None, None


class Experts(torch.nn.Module):
    """``linear_fc1``, weighted SwiGLU and ``linear_fc2`` of the experts of this rank."""

    def __init__(
        self, config: TransformerConfig, moe: MoEShape, experts: ExpertParallel, recompute_activation: bool
    ) -> None:
        super().__init__()
        count, inner = len(experts.experts(moe.num_experts)), moe.ffn_hidden_size // experts.etp_size
        self.recompute_activation = recompute_activation
        self.linear_fc1 = GroupedLinear(count, 2 * inner, config.hidden_size, config.params_dtype)
        self.linear_fc2 = GroupedLinear(count, config.hidden_size, inner, config.params_dtype)

    def begin(self) -> Callable[[ExpertRows], Tensor]:
        """What is returned computes the experts' outputs ``[R, h]``.

        The earlier this is called, the later the adapters' weight gradients are computed, after the input's have been
        sent off.
        """
        first, second = self.linear_fc1.begin(), self.linear_fc2.begin()

        def compute(rows: ExpertRows) -> Tensor:
            gate_up = first(rows.hidden, rows.offsets, rows.keys)
            activated = weighted_swiglu(gate_up, rows.weights)
            kept = gate_up.detach(), rows.weights.detach()
            again: Again | None = partial(_activation, *kept) if self.recompute_activation else None
            return second(activated, rows.offsets, rows.keys, again)

        return compute


def weighted_swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    """``w · silu(gate) · up``: ``[R, 2f]``, gate before up, and ``weights [R]`` float32 to ``[R, f]``."""
    output: Tensor = _WeightedSwiGLU.apply(gate_up, weights)
    return output


def _activation(gate_up: Tensor, weights: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up).mul_(weights.unsqueeze(1).to(gate_up.dtype))


class _WeightedSwiGLU(torch.autograd.Function):
    """``y = w · silu(a) · b`` (:mod:`mindspeed_lora.models.swiglu`, with a weight for each row).

    ``da = w g b silu'(a)``, ``db = w g silu(a)``, ``dw = Σ g silu(a) b``. Saves its inputs; both gradients of the
    first are written into one buffer.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        return _activation(gate_up, weights)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate_up, weights = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        activated = torch.ops.aten.silu.out(gate, out=grad_up)
        grad_weights = None
        if ctx.needs_input_grad[1]:
            grad_weights = (grad_outputs[0] * activated).mul_(up).sum(dim=1, dtype=weights.dtype)
        weighted = grad_outputs[0] * weights.unsqueeze(1).to(gate_up.dtype)
        torch.mul(weighted, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        grad_up.mul_(weighted)
        return grad, grad_weights
