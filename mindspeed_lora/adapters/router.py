"""LoRA on the router of a layer of experts: ``logits = x Wᵀ + s · (x Aᵀ) Bᵀ``, whole on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from mindspeed_lora.adapters.lora import LoraPart
from mindspeed_lora.adapters.side_branch import RowBlock
from mindspeed_lora.adapters.spec import PartSpec
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.moe.router import Router

Tensor = torch.Tensor


class RouterLora(torch.nn.Module):
    """``A [r, h]`` and ``B [E, r]`` of one router.

    Each rank routes its own tokens, so that the gradients of both are partial sums over TP.
    """

    def __init__(self, part: LoraPart, tp_size: int) -> None:
        super().__init__()
        self.part = part
        for factor in (part.lora_a, part.lora_b):
            marked: Any = factor
            marked.partial_over_tp = tp_size > 1

    def forward(self, tokens: Tensor) -> Tensor:
        """What ``tokens [T, h]`` add to the logits ``[T, E]``."""
        lora_a, lora_b = (factor.to(tokens.dtype) for factor in (self.part.lora_a, self.part.lora_b))
        return F.linear(F.linear(tokens, lora_a), lora_b) * self.part.scaling


def add_router_adapter(router: Router, spec: PartSpec, dropout: float, tp_size: int) -> None:
    """Gives a router its adapter.

    Raises:
        Refused: dropout of the adapter's input is asked for.
    """
    if dropout > 0.0:
        raise Refused(
            f"--lora-dropout {dropout:g}: not built for an adapter on the router ({spec.module}); give 0, leave the "
            "router out of --lora-target-modules, or train it whole (--lora-modules-to-save router)"
        )
    weight = router.weight
    rows = RowBlock(0, weight.size(0))
    part = LoraPart(spec.rank, weight.size(1), rows, spec.scaling, weight.dtype, weight.device)
    for kind in ("lora_a", "lora_b"):
        factor: Any = getattr(part, kind)
        factor.canonical_name = f"{spec.name}.{kind}"
    router.adapter = RouterLora(part, tp_size)
