"""The shared experts: one MLP that every token goes through, cut over TP like any other."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from mindspeed_lora.config.shape import MoEShape
from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.models.layer import MLP
from mindspeed_lora.models.turns import Steps

Tensor = torch.Tensor


class SharedExperts(MLP):
    """An MLP of the shared width; with ``gate_weight [1, h]`` its output is multiplied by ``σ(x · gate)``."""

    def __init__(self, config: TransformerConfig, moe: MoEShape) -> None:
        # megatron-core takes the width of linear_fc2 from the configuration alone.
        config = copy.copy(config)
        config.ffn_hidden_size = moe.shared_ffn_hidden_size
        super().__init__(config)
        self.gate_weight: torch.nn.Parameter | None = None
        if moe.shared_expert_gate:
            self.gate_weight = torch.nn.Parameter(
                torch.empty(1, config.hidden_size, dtype=config.params_dtype)
            )
            gate: Any = self.gate_weight
            gate.sequence_parallel = config.sequence_parallel

    def steps(
        self, hidden_states: Tensor, context: ForwardContext | None
    ) -> Steps[tuple[Tensor, Tensor | None]]:
        """As :meth:`MLP.steps`, with as many pauses."""
        gate = None
        if self.gate_weight is not None:
            gate = F.linear(hidden_states, self.gate_weight.to(hidden_states.dtype)).sigmoid()
        output, bias = yield from super().steps(hidden_states, context)
        return (output if gate is None else output * gate), bias
