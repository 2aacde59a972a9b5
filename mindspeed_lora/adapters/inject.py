"""Injection: the target linears of a model are replaced by linears that carry an adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from mindspeed_lora.adapters.lora import ColumnParallelLora, LoraPart, ParallelLoraLinear, RowParallelLora
from mindspeed_lora.adapters.products import RowBlock
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.gpt import GPTModel


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """What is injected: rank, scaling, dropout and the targets by Megatron's names."""

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """``α / r``, or ``α / √r`` for rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def inject_adapters(model: GPTModel, spec: AdapterSpec) -> list[str]:
    """Freezes the model and gives each target linear an adapter; values are filled in afterwards.

    A stays uninitialised until it is drawn or read, B is zero.

    Returns:
        The local names of the linears that were replaced.

    Raises:
        Refused: a target names no linear of the model.
    """
    model.requires_grad_(False)
    linears = [name for name, _ in model.named_modules() if _last(name).startswith("linear_")]
    available = sorted({_last(name) for name in linears})
    for target in spec.target_modules:
        if target not in available:
            raise Refused(
                f"--lora-target-modules: the model has no module {target}; it has {', '.join(available)}"
            )
    replaced = [name for target in spec.target_modules for name in linears if _last(name) == target]
    for name in replaced:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, child, _with_adapter(getattr(parent, child), spec, model))
    return replaced


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _with_adapter(base: torch.nn.Module, spec: AdapterSpec, model: GPTModel) -> ParallelLoraLinear:
    weight: torch.Tensor = base.weight  # type: ignore[assignment]
    out_features, in_features = weight.shape
    part = LoraPart(
        spec.rank, in_features, RowBlock(0, out_features), spec.scaling, weight.dtype, weight.device
    )
    sequence_parallel = model.config.sequence_parallel
    group = model.groups.tp_group
    if isinstance(base, ColumnParallelLinear):
        part.lora_a.partial_over_tp = True  # type: ignore[attr-defined]
        return ColumnParallelLora(base, [part], spec.dropout, sequence_parallel, group)
    part.lora_b.partial_over_tp = True  # type: ignore[attr-defined]
    return RowParallelLora(base, [part], spec.dropout, sequence_parallel, group)
