"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) that megatron-core accepts under sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

Tensor = torch.Tensor


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor that megatron-core's layer specification calls.

    The weight is replicated over TP. Under sequence parallelism each rank sees only its part of the sequence,
    so ``sequence_parallel`` marks the weight's gradient as a partial sum over TP.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """``x / √(mean(x²) + ε) · w`` over the last dimension of ``[…, h]``."""
        if x.device.type != "cpu" or x.dtype is torch.bfloat16 or x.dtype is torch.float16:
            # CUDA has a fused kernel; on the CPU torch takes a dozen passes where the Function takes five.
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        output: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return output


class _RMSNorm(torch.autograd.Function):
    """``y = r · x · w`` with ``r = 1/√(mean(x²) + ε)``.

    ``dx = r · (gw − x · r² · mean(gw · x))``, ``gw = g · w``; ``dw = Σ g · x · r``. Saves x and r ``[…, 1]``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        r = square.div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_outputs[0] * x * r).flatten(0, -2).sum(dim=0)
        grad = grad_outputs[0] * weight
        mean = torch.linalg.vecdot(grad, x).unsqueeze(-1).div_(-x.size(-1))
        return grad.addcmul_(x, mean.mul_(r.square())).mul_(r), grad_weight, None


class OffsetRMSNorm(RMSNorm):
    """RMSNorm whose weight is counted from 1 (Gemma): ``x / √(mean(x²) + ε) · (1 + w)``, computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Over the last dimension of ``[…, h]``."""
        weight = 1.0 + self.weight.float()
        if x.device.type == "cpu" and x.dtype is torch.float32:
            output: Tensor = _RMSNorm.apply(x, weight, self.eps)
            return output
        return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).type_as(x)


class HeadRMSNorm(RMSNorm):
    """RMSNorm over the width of one head (Qwen3's query and key norm).

    Each TP rank holds other heads, so the weight's gradient is a partial sum over TP in any case.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(config, hidden_size, eps)
        self.weight.partial_over_tp = True  # type: ignore[attr-defined]
