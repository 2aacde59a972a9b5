"""Softcapped attention: plain arithmetic with autograd is the reference, in float64."""

from __future__ import annotations

import pytest
import torch

from mindspeed_lora.device import capped_attention as capped

Tensor = torch.Tensor
SCALE, CAP = 0.4, 1.5


def operands(s: int = 13, t: int = 13) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = (2, 6, s, 8), (2, 3, t, 8), (2, 3, t, 5)
    query, key, value = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return query, key, value


def expected(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    key, value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
    scores = CAP * torch.tanh(query @ key.transpose(-1, -2) * SCALE / CAP)
    scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(dim=-1) @ value, scores.logsumexp(dim=-1)


@pytest.mark.parametrize("block", [1 << 24, 1])
@pytest.mark.parametrize("kind", ["causal", "full", "band"])
def test_values_and_gradients(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capped, "_SCORES", block)
    length = 41
    inputs = operands(length, length)
    seen = torch.ones(length, length, dtype=torch.bool)
    if kind != "full":
        seen = seen.tril()
    if kind == "band":
        seen = seen.triu(-6)
    mask = torch.zeros(length, length, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    own_mask = mask if kind == "band" else None
    with torch.no_grad():
        out, lse = capped.capped_forward(*inputs, kind == "causal", own_mask, SCALE, CAP)
    right, right_lse = expected(*inputs, seen)
    torch.testing.assert_close(out, right)
    torch.testing.assert_close(lse, right_lse)
    gradient = torch.randn_like(right)
    with torch.no_grad():
        found = capped.capped_backward(gradient, inputs, out, lse, kind == "causal", own_mask, SCALE, CAP)
    for one, other in zip(found, torch.autograd.grad(right, inputs, gradient), strict=True):
        torch.testing.assert_close(one, other)


def test_new_tokens_see_all_before_them() -> None:
    inputs = operands(3, 13)
    seen = torch.ones(3, 13, dtype=torch.bool).tril(10)
    right, _ = expected(*inputs, seen)
    torch.testing.assert_close(capped.capped_attention(*inputs, True, None, SCALE, CAP), right)
    torch.testing.assert_close(capped.capped_attention(*inputs, False, seen, SCALE, CAP), right)


def test_without_the_bound_the_result_is_another() -> None:
    inputs = operands()
    bounded, _ = capped.capped_forward(*inputs, True, None, SCALE, CAP)
    free, _ = capped.capped_forward(*inputs, True, None, SCALE, 1e6)
    assert (bounded - free).abs().max() > 0.1


def test_dropout_keeps_the_mean() -> None:
    inputs = operands()
    torch.manual_seed(1)
    with torch.no_grad():
        right, _ = capped.capped_forward(*inputs, True, None, SCALE, CAP)
        draws = [capped.capped_attention(*inputs, True, None, SCALE, CAP, dropout=0.3) for _ in range(2000)]
    # 2000 draws of weights below 1: deviations of about 0.03 at most.
    torch.testing.assert_close(torch.stack(draws).mean(dim=0), right, rtol=0, atol=0.15)
