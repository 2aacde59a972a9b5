"""SwiGLU (Shazeer 2020, arXiv 2002.05202, equation 6) on gate and up as ``linear_fc1`` leaves them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) · up``: ``[…, 2 f]``, gate before up, to ``[…, f]``."""
    output: Tensor = _SwiGLU.apply(gate_up)
    return output


class _SwiGLU(torch.autograd.Function):
    """``y = silu(a) · b``; ``da = g · b · silu'(a)``, ``db = g · silu(a)``.

    Saves its input alone; both gradients are written into one buffer of the input's shape, so that nothing is
    joined afterwards.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(grad_outputs[0], up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        torch.ops.aten.silu.out(gate, out=grad_up)
        grad_up.mul_(grad_outputs[0])
        return grad
