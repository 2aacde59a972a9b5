"""The router of a layer of experts: ``logits = x Wᵀ``, the choice of experts, and the auxiliary losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from mindspeed_lora.config.shape import MoEShape
from mindspeed_lora.models.moe.aux_losses import TokenPlace, attach_loss, auxiliary_losses
from mindspeed_lora.models.moe.routing import Routing, full_precision, route, within_capacity
from mindspeed_lora.models.moe.settings import MoESettings
from mindspeed_lora.parallel.groups import ParallelGroups

Tensor = torch.Tensor


class Router(torch.nn.Module):
    """Replicated on every rank; each routes its own tokens.

    The weight's gradient, where it is trained, is therefore a partial sum over TP (``partial_over_tp``).
    """

    def __init__(
        self, config: TransformerConfig, moe: MoEShape, groups: ParallelGroups, settings: MoESettings
    ) -> None:
        super().__init__()
        self.moe, self.settings = moe, settings
        self.tp_cp_group = groups.tp_cp_group
        self.weight = torch.nn.Parameter(
            torch.empty(moe.num_experts, config.hidden_size, dtype=config.params_dtype)
        )
        weight: Any = self.weight
        weight.partial_over_tp = groups.tp_size > 1
        self.expert_bias: torch.nn.Parameter | None = None
        if moe.expert_bias:
            self.expert_bias = torch.nn.Parameter(torch.zeros(moe.num_experts), requires_grad=False)
        self.adapter: torch.nn.Module | None = None
        """Adds to the logits of ``tokens [T, h]``, where the router is adapted."""
        self._losses: dict[str, Tensor] = {}

    def forward(
        self, tokens: Tensor, place: TokenPlace, aux_loss_scale: Tensor | float | None = None
    ) -> Routing:
        """Where ``tokens [T, h]`` go.

        Args:
            place: which tokens of the micro-batch they are.
            aux_loss_scale: on the gradients of the auxiliary losses; None: they are not computed.
        """
        logits = self.logits(tokens)
        routing = within_capacity(
            route(logits, self.moe, self.expert_bias), self.moe.num_experts, self.settings
        )
        # Recomputation runs a first pass without gradients, whose losses would count twice.
        if aux_loss_scale is None or not torch.is_grad_enabled():
            return routing
        weights = routing.weights
        losses = auxiliary_losses(logits, self.moe, self.settings, place, self.tp_cp_group)
        for name, loss in losses.items():
            weights = attach_loss(weights, loss, aux_loss_scale)
            seen = self._losses.get(name)
            self._losses[name] = loss.detach() if seen is None else seen + loss.detach()
        return routing._replace(weights=weights)

    def logits(self, tokens: Tensor) -> Tensor:
        """``[T, E]`` of ``tokens [T, h]``."""
        if self.settings.router_fp32 or self.moe.score_function == "sigmoid":
            tokens = full_precision(tokens)
        logits = F.linear(tokens, self.weight.to(tokens.dtype))
        return logits if self.adapter is None else logits + self.adapter(tokens)

    def take_losses(self) -> dict[str, Tensor]:
        """This rank's part of each loss, coefficient included, summed since the last call; for logging."""
        losses, self._losses = self._losses, {}
        return losses
