"""Adapters on the stacked linears of experts: one pair of factors for each expert, or one for all of a layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mindspeed_lora.adapters.grouped import GroupedLora, GroupedLoraPart
from mindspeed_lora.adapters.local_rows import local_rows
from mindspeed_lora.adapters.spec import AdapterSpec, PartSpec
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.moe.experts import GroupedLinear

_EXPERT = re.compile(r"\.experts\.local_experts\.\d+\.")

if TYPE_CHECKING:
    from mindspeed_lora.models.gpt import GPTModel


def with_expert_adapters(
    base: GroupedLinear,
    stack: str,
    by_module: Mapping[str, Sequence[PartSpec]],
    dropout: float,
    model: GPTModel,
) -> GroupedLora | None:
    """The linear with its adapter, which :func:`check_expert_adapters` has seen; None where it has none.

    Args:
        base: a linear of all experts of this rank.
        stack: its canonical name, without experts' numbers.
        by_module: the adapter's pairs of factors by canonical linear.
        dropout: of the adapter's input.
        model: the chunk that holds it.
    """
    shared = by_module.get(stack)
    parts = by_module.get(_of_expert(stack, 0), ()) if shared is None else shared
    if not parts:
        return None
    experts, weight = model.groups.experts, base.weight
    built = []
    for spec in parts:
        part = GroupedLoraPart(
            rank=spec.rank,
            num_experts=weight.size(0) if shared is None else None,
            in_features=weight.size(2),
            rows=local_rows(spec, model.shape, weight.size(1), experts.etp_size),
            scaling=spec.scaling,
            dtype=weight.dtype,
            device=weight.device,
        )
        name = f"{stack}.{spec.label}" if spec.label else stack
        for kind in ("lora_a", "lora_b"):
            factor: Any = getattr(part, kind)
            factor.canonical_name = f"{name}.{kind}"
        built.append(part)
    column = stack.endswith("linear_fc1")
    return GroupedLora(base, built, dropout, column, experts.etp_size, experts.etp_rank)


def check_expert_adapters(spec: AdapterSpec, shape: ModelShape) -> None:
    """Refuse adapters that differ among the experts of a layer, whose factors are stacked.

    Raises:
        Refused: some of a layer's experts have an adapter and others not, or one of another rank or scaling.
    """
    if shape.moe is None:
        return
    by_module: dict[str, list[PartSpec]] = {}
    stacks: dict[str, None] = {}
    for part in spec.parts:
        by_module.setdefault(part.module, []).append(part)
        stack = _EXPERT.sub(".experts.", part.module)
        if stack != part.module:
            stacks[stack] = None
    for stack in stacks:
        experts = (_of_expert(stack, expert) for expert in range(shape.moe.num_experts))
        _check_alike(stack, [by_module.get(module, []) for module in experts])


def _of_expert(stack: str, expert: int) -> str:
    return stack.replace(".experts.", f".experts.local_experts.{expert}.", 1)


def _check_alike(stack: str, every: Sequence[Sequence[PartSpec]]) -> None:
    kinds = [{(part.label, part.rank, part.scaling) for part in parts} for parts in every]
    first = next((number for number, kind in enumerate(kinds) if kind != kinds[0]), None)
    if first is not None:
        raise Refused(
            f"{stack}: expert 0 has {_told(every[0])} and expert {first} {_told(every[first])}; the adapters of a "
            "layer's experts are one grouped product, which needs the same on every expert: name all of them, with "
            "one rank and alpha"
        )


def _told(parts: Sequence[PartSpec]) -> str:
    return (
        ", ".join(
            f"r {part.rank} with scaling {part.scaling:g} on {part.label or part.linear}" for part in parts
        )
        or "no adapter"
    )
