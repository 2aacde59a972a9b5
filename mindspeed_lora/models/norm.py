"""RMSNorm that megatron-core accepts under sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor that megatron-core's layer specification calls.

    The weight is replicated over TP. Under sequence parallelism each rank sees only its part of the sequence,
    so ``sequence_parallel`` marks the weight's gradient as a partial sum over TP.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class HeadRMSNorm(RMSNorm):
    """RMSNorm over the width of one head (Qwen3's query and key norm).

    Each TP rank holds other heads, so the weight's gradient is a partial sum over TP in any case.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(config, hidden_size, eps)
        self.weight.partial_over_tp = True  # type: ignore[attr-defined]
