"""The fused kernels against the plain steps, and these against autograd."""

from __future__ import annotations

import pytest
import torch

from mindspeed_lora.device import attention
from mindspeed_lora.device.attention import (
    flash_backward,
    flash_forward,
    plain_backward,
    plain_forward,
    rows_at_once,
)

Tensor = torch.Tensor
SCALE = 0.3


def operands(
    s: int, t: int, n: int, g: int, dtype: torch.dtype = torch.float64, value_width: int = 8
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(s * t * n * g)
    sizes = ((n, s, 8), (g, t, 8), (g, t, value_width))
    make = [torch.randn(2, heads, length, width, generator=generator) for heads, length, width in sizes]
    return tuple(tensor.to(dtype) for tensor in make)


def some_mask(s: int, t: int) -> Tensor:
    mask = torch.where(torch.arange(t) % 3 == 1, -torch.inf, 0.0).expand(s, t).clone()
    mask[0] = 0.0
    return mask.double()


CASES = [
    pytest.param((6, 6), True, False, id="causal"),
    pytest.param((5, 7), False, False, id="full"),
    pytest.param((5, 7), False, True, id="mask"),
]


@pytest.mark.parametrize(("n", "g"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("lengths", "causal", "masked"), CASES)
def test_plain_steps(n: int, g: int, lengths: tuple[int, int], causal: bool, masked: bool) -> None:
    query, key, value = (tensor.requires_grad_() for tensor in operands(*lengths, n, g))
    mask = some_mask(*lengths) if masked else None
    scores = query @ key.repeat_interleave(n // g, 1).transpose(-1, -2) * SCALE
    if causal:
        scores = scores.masked_fill(torch.ones(lengths, dtype=torch.bool).triu(1), -torch.inf)
    scores = scores if mask is None else scores + mask
    expected = scores.softmax(-1) @ value.repeat_interleave(n // g, 1)
    out, lse = plain_forward(query, key, value, causal, mask, SCALE)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, (query, key, value), grad)
    found = plain_backward(grad, (query, key, value), out.detach(), lse.detach(), causal, mask, SCALE)
    for gradient, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value_width", [8, 5, 13], ids=["one width", "narrower values", "wider values"])
@pytest.mark.parametrize(("lengths", "causal", "masked"), CASES)
def test_kernel_of_the_device(
    lengths: tuple[int, int], causal: bool, masked: bool, value_width: int, dtype: torch.dtype
) -> None:
    """On strided views, as attention gives them."""
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    three = operands(*lengths, 6, 2, dtype, value_width)
    query, key, value = (t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for t in three)
    mask = some_mask(*lengths).to(dtype) if masked else None
    out, lse = flash_forward(query, key, value, causal, mask, SCALE)
    expected, expected_lse = plain_forward(query, key, value, causal, mask, SCALE)
    assert out.dtype is dtype
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=tolerance, atol=tolerance)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = flash_backward(grad, (query, key, value), out, lse, causal, mask, SCALE)
    wanted = plain_backward(grad, (query, key, value), expected, expected_lse, causal, mask, SCALE)
    for gradient, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=tolerance, atol=2 * tolerance)


def test_no_kernel_for_all_rows_on_the_cpu() -> None:
    query, key, value = (torch.randn(4, 1, 2, 8) for _ in range(3))
    assert rows_at_once(query, key, value, None, None, SCALE) is None


def test_bounds_of_sub_rows_one_behind_the_other() -> None:
    found = attention._bounds(((2, 3), (5,)), torch.device("cpu"))
    assert (found.tolist(), found.dtype) == ([0, 2, 5, 10], torch.int32)
