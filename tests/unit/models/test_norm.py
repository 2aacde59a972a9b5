"""RMSNorm against transformers', and the marks by which gradients are summed."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mindspeed_lora.models.norm import HeadRMSNorm, OffsetRMSNorm, RMSNorm


def config(sequence_parallel: bool = False, dtype: torch.dtype = torch.float32) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        tensor_model_parallel_size=2 if sequence_parallel else 1,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
    )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.1])
def test_values_and_gradients(eps: float, frozen: bool) -> None:
    """Against float64: transformers' own in float32 is as far from it, by the roundings of a sum that cancels."""
    torch.manual_seed(0)
    weight, x, grad = torch.rand(16) + 0.5, torch.randn(5, 2, 16) * 0.1, torch.randn(5, 2, 16)
    results = []
    for norm, dtype in (
        (RMSNorm(config(), 16, eps=eps), torch.float32),
        (LlamaRMSNorm(16, eps=eps), torch.float64),
    ):
        norm.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=not frozen)
        inputs = x.to(dtype, copy=True).requires_grad_()
        out = _in_float64(inputs, norm) if dtype is torch.float64 else norm(inputs)
        (out * grad.to(dtype)).sum().backward()
        results.append([out, inputs.grad, *([] if frozen else [norm.weight.grad])])
    for found, expected in zip(*results, strict=True):
        assert (found.double() - expected).norm() <= 3e-7 * expected.norm()


def _in_float64(x: torch.Tensor, norm: LlamaRMSNorm) -> torch.Tensor:
    """transformers' norm without its cast to float32."""
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def test_weight_has_the_model_s_dtype() -> None:
    assert RMSNorm(config(dtype=torch.bfloat16), 16).weight.dtype is torch.bfloat16


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_under_sequence_parallelism_the_gradient_is_partial(sequence_parallel: bool) -> None:
    assert RMSNorm(config(sequence_parallel), 16).weight.sequence_parallel is sequence_parallel


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_norm_over_heads_is_always_partial(sequence_parallel: bool) -> None:
    """Each TP rank normalises other heads, so the sum is needed without sequence parallelism too."""
    assert HeadRMSNorm(config(sequence_parallel), 8).weight.partial_over_tp is True
    assert not hasattr(RMSNorm(config(sequence_parallel), 16).weight, "partial_over_tp")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.0)])
def test_a_weight_counted_from_1_is_gemmas(dtype: torch.dtype, tolerance: float) -> None:
    """In bfloat16 the same bits: both compute in float32 and round once."""
    torch.manual_seed(0)
    weight, x, grad = (torch.randn(size).to(dtype) for size in ((16,), (5, 2, 16), (5, 2, 16)))
    results = []
    for norm in (OffsetRMSNorm(config(dtype=dtype), 16, eps=1e-6), Gemma2RMSNorm(16, eps=1e-6)):
        norm.weight = torch.nn.Parameter(weight)
        inputs = x.clone().requires_grad_()
        out = norm(inputs)
        (out * grad).sum().backward()
        results.append((out, inputs.grad, norm.weight.grad))
    (ours, *our_grads), (theirs, *their_grads) = results
    assert ours.dtype is dtype
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for one, other in zip(our_grads, their_grads, strict=True):
        # Gradients are rounded by other sums.
        torch.testing.assert_close(one, other, rtol=max(tolerance, 1e-2), atol=max(tolerance, 1e-2))
