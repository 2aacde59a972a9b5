"""PEFT's adapters on stacked experts, taken apart: which rows and columns of its factors are of which expert.

transformers 5 keeps the experts of a layer as ``gate_up_proj [E, 2f, h]`` and ``down_proj [E, h, f]``; PEFT's factors
on such a parameter are ``lora_A [E·r, in]``, expert by expert, and ``lora_B [out, r·E]``, whose columns run over the
experts first. One A serves gate and up, as Megatron's ``linear_fc1`` has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

PARAMETERS = {"gate_up_proj": "linear_fc1", "down_proj": "linear_fc2"}


@dataclass(frozen=True)
class ExpertFactor:
    """One factor of PEFT's on the experts of a layer."""

    layer: str
    linear: str
    kind: str
    """``lora_a`` or ``lora_b``."""
    num_experts: int

    def split(self, factor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each expert's own, by canonical name."""
        if self.kind == "lora_a":
            experts = factor.unflatten(0, (self.num_experts, -1)).unbind(0)
        else:
            experts = factor.unflatten(1, (-1, self.num_experts)).unbind(2)
        place = f"decoder.layers.{self.layer}.mlp.experts.local_experts"
        return {
            f"{place}.{number}.{self.linear}.{self.kind}": expert.clone()
            for number, expert in enumerate(experts)
        }


def split_weight(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """Each expert's matrix of a stacked parameter, or the router's, by canonical name; None for others."""
    layer, rest = name.split(".")[2:3], name.rpartition(".mlp.")[2]
    if rest in ("gate.weight", "gate.lora_a", "gate.lora_b"):
        return {f"decoder.layers.{layer[0]}.mlp.router.{rest.removeprefix('gate.')}": weight.clone()}
    linear = PARAMETERS.get(rest.removeprefix("experts."))
    if linear is None or not rest.startswith("experts."):
        return None
    place = f"decoder.layers.{layer[0]}.mlp.experts.local_experts"
    return {f"{place}.{number}.{linear}.weight": one.clone() for number, one in enumerate(weight)}


def experts_of(model: Any, targets: Sequence[str]) -> list[str] | None:
    """PEFT's ``target_parameters`` of a model's experts; None where it has none."""
    found = {
        f"experts.{parameter}"
        for name, _ in model.named_parameters()
        for parameter, linear in PARAMETERS.items()
        if name.endswith(f"mlp.experts.{parameter}") and linear in targets
    }
    return sorted(found) or None


def expert_factors(model: Any) -> dict[str, ExpertFactor]:
    """The factors on stacked experts, by the parameter's name without what PEFT puts around it."""
    from peft.tuners.lora.layer import ParamWrapper

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper) and module.parameter_name in PARAMETERS:
            for kind in ("lora_a", "lora_b"):
                found[f"{name}.{kind}"] = ExpertFactor(
                    name.split(".")[2], PARAMETERS[module.parameter_name], kind, module.num_experts
                )
    return found
