"""Gated activations against torch's own and autograd, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from mindspeed_lora.models.swiglu import geglu, geglu_tanh, swiglu

Tensor = torch.Tensor


@pytest.mark.parametrize(
    ("ours", "activation"),
    [
        (swiglu, F.silu),
        (geglu, F.gelu),
        (geglu_tanh, lambda x: F.gelu(x, approximate="tanh")),
    ],
)
def test_values_and_gradients(
    ours: Callable[[Tensor], Tensor], activation: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(5, 2, 14, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(5, 2, 7, dtype=torch.float64)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = activation(gate) * up
    found = ours(gate_up)
    torch.testing.assert_close(found, expected)
    of_found, of_expected = (torch.autograd.grad(out, gate_up, gradient)[0] for out in (found, expected))
    torch.testing.assert_close(of_found, of_expected)
