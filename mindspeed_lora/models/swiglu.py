"""SwiGLU and GEGLU (Shazeer 2020, arXiv 2002.05202, equation 6) on gate and up as ``linear_fc1`` leaves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from mindspeed_lora.config.shape import ModelShape

Tensor = torch.Tensor
Activation = Callable[[Tensor], Tensor]


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh form (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2)."""
    return F.gelu(x, approximate="tanh")


def activation(shape: ModelShape) -> Activation:
    """What a model's MLP applies to the gate."""
    if shape.feature("gelu_tanh"):
        return gelu_tanh
    return F.gelu if shape.feature("geglu") else F.silu


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


def geglu(gate_up: Tensor) -> Tensor:
    """``gelu(gate) · up``: ``[…, 2 f]``, gate before up, to ``[…, f]``."""
    output: Tensor = _GeGLU.apply(gate_up, "none")
    return output


def geglu_tanh(gate_up: Tensor) -> Tensor:
    """:func:`geglu` with :func:`gelu_tanh`."""
    output: Tensor = _GeGLU.apply(gate_up, "tanh")
    return output


class _GeGLU(torch.autograd.Function):
    """``y = gelu(a) · b``; ``da = g · b · gelu'(a)``, ``db = g · gelu(a)``. Saves its input alone."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.approximate = approximate
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate=approximate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        of_gate = grad_outputs[0] * up
        grad_gate.copy_(torch.ops.aten.gelu_backward(of_gate, gate, approximate=ctx.approximate))
        torch.mul(F.gelu(gate, approximate=ctx.approximate), grad_outputs[0], out=grad_up)
        return grad, None


GATED: dict[Activation, Activation] = {F.silu: swiglu, F.gelu: geglu, gelu_tanh: geglu_tanh}
"""Activation of the gate → the same on gate and up together."""
