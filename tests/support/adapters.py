"""Adapters of tests: planned from flags as keywords, with random factors, written as PEFT folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.checkpoint.canonical import LINEARS
from mindspeed_lora.checkpoint.loading.model import AdapterPlan
from mindspeed_lora.checkpoint.peft.plan import plan_adapter
from mindspeed_lora.checkpoint.peft.source import write_adapter
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.config.shape import ModelShape
from tests.support.shards import Tensors

ALL = tuple(LINEARS)
"""Megatron's names of the linears that take adapters."""


def new_adapter(shape: ModelShape, r: int = 4, alpha: int = 8, seed: int = 1, **flags: Any) -> AdapterPlan:
    """The plan of a new adapter on the model, on all linears unless ``lora_target_modules`` says otherwise."""
    given = {"lora_target_modules": ALL, **flags}
    plan = plan_adapter(LoraConfig(lora_r=r, lora_alpha=alpha, **given), shape, seed)
    assert plan is not None
    return plan


def random_factors(plan: AdapterPlan, seed: int = 1) -> Tensors:
    """Random values of every factor, and of what is trained with them, by canonical name."""
    generator = torch.Generator().manual_seed(seed)
    sizes: dict[str, tuple[int, ...]] = {**plan.spec.tensors}
    sizes.update({tensor.name: tensor.size for tensor in plan.spec.trained})
    sizes.update({rows.name: (len(rows.tokens), rows.width) for rows in plan.spec.token_rows})
    return {name: torch.randn(size, generator=generator) * 0.2 for name, size in sizes.items()}


def write(
    folder: Path,
    shape: ModelShape,
    plan: AdapterPlan,
    tensors: Tensors | None = None,
    base_model_name: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """Writes the adapter as a PEFT folder, with random factors where none are given; returns the factors."""
    tensors = random_factors(plan) if tensors is None else tensors
    config = dataclasses.replace(plan.config, base_model_name=base_model_name)
    write_adapter(folder, shape, config, plan.spec, tensors, dtype)
    return tensors
