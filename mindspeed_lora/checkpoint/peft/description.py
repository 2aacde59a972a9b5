"""From an adapter's configuration to its description on one model: which pairs of factors, over which rows.

A fused linear (``linear_qkv``, ``linear_fc1``) takes either one pair, whose A its matrices share, or a pair for
each of its matrices that is a target. PEFT's files do not tell the two apart: the caller says which linears share.
Of experts each has its own pairs, or all of a layer have one (``--lora-moe-shared``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from mindspeed_lora.adapters.spec import AdapterSpec, PartSpec
from mindspeed_lora.checkpoint.canonical import (
    ROUTER,
    adapter_linears,
    expert_number,
    linear_kind,
    of_all_experts,
)
from mindspeed_lora.checkpoint.peft.config import AdapterConfig
from mindspeed_lora.checkpoint.peft.token_rows import token_rows
from mindspeed_lora.checkpoint.peft.trained_tensors import trained_tensors, unties
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES

FUSED = ("linear_qkv", "linear_fc1", "experts.linear_fc1", "shared_experts.linear_fc1")
"""Kinds of linears that hold several Hugging Face matrices, or one that is packed."""


def describe_adapter(
    config: AdapterConfig, shape: ModelShape, shared: Collection[str], moe_shared: bool = False
) -> AdapterSpec:
    """The description of an adapter on a model of this shape.

    Args:
        config: what is targeted, with which ranks and alphas.
        shape: the model's, without the adapter but with its vocabulary.
        shared: the kinds of fused linears (``linear_qkv``, ``experts.linear_fc1``) whose matrices share one A.
        moe_shared: one pair of factors for all experts of a layer and linear.

    Raises:
        Refused: nothing is targeted, or one pair of factors would need several ranks or scalings.
    """
    parts = [
        part
        for module, size in adaptable(shape).items()
        for part in _parts(config, shape, module, size, linear_kind(module) in shared)
    ]
    return AdapterSpec(
        parts=_one_for_all_experts(parts, shape) if moe_shared else tuple(parts),
        dropout=config.dropout,
        trained=trained_tensors(config, shape),
        token_rows=token_rows(config, shape),
        untied=unties(config, shape),
    )


def adaptable(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Canonical name and ``(out, in)`` of every linear that takes an adapter, the routers among them."""
    if shape.moe is None:
        return adapter_linears(shape)
    routers = {
        f"decoder.layers.{layer}.{ROUTER}": (shape.moe.num_experts, shape.hidden_size)
        for layer in range(shape.num_layers)
        if shape.has_experts(layer)
    }
    return adapter_linears(shape) | routers


def hf_linears(shape: ModelShape) -> dict[str, tuple[str, ...]]:
    """Canonical linear → full Hugging Face names of its matrices, in the order of the forward pass."""
    linears = {}
    for module in adaptable(shape):
        mapping, layer = FAMILIES[shape.family].mapping(f"{module}.weight")
        linears[module] = mapping.modules(layer)
    return linears


def _parts(
    config: AdapterConfig, shape: ModelShape, module: str, full: tuple[int, int], shared: bool
) -> Iterator[PartSpec]:
    mapping, layer = FAMILIES[shape.family].mapping(f"{module}.weight")
    names = mapping.modules(layer)
    targeted = [name for name in names if config.targets(name)]
    if not targeted:
        return
    if len(names) == 1 or shared:
        _check_shared(config, module, names, targeted)
        yield _part(config, module, "", names, full)
        return
    for name, size in zip(names, mapping.hf_shapes(shape, full), strict=True):
        if name in targeted:
            yield _part(config, module, name.rpartition(".")[2], (name,), (size[0], full[1]))


def _part(
    config: AdapterConfig, module: str, label: str, hf_modules: tuple[str, ...], size: tuple[int, int]
) -> PartSpec:
    first = hf_modules[0]
    return PartSpec(
        module=module,
        label=label,
        hf_modules=hf_modules,
        rank=config.rank_of(first),
        alpha=config.alpha_of(first),
        scaling=config.scaling_of(first),
        out_features=size[0],
        in_features=size[1],
    )


def _one_for_all_experts(parts: list[PartSpec], shape: ModelShape) -> tuple[PartSpec, ...]:
    """The parts with one in place of those of all experts of a layer, which must be alike."""
    found: dict[str, PartSpec] = {}
    counts: dict[str, int] = {}
    for part in parts:
        if expert_number(part.module) is None:
            found[part.name] = part
            continue
        own = dataclasses.replace(part, module=of_all_experts(part.module))
        counts[own.name] = counts.get(own.name, 0) + 1
        first = found.setdefault(own.name, own)
        if (own.rank, own.alpha) != (first.rank, first.alpha):
            raise Refused(
                f"--lora-moe-shared: one pair of factors for all experts has one rank and alpha, but {part.module} has "
                f"r {own.rank}, alpha {own.alpha:g}, and the first expert r {first.rank}, alpha {first.alpha:g}"
            )
        if first is not own:
            found[own.name] = dataclasses.replace(first, hf_modules=(*first.hf_modules, *own.hf_modules))
    for name, count in counts.items():
        if shape.moe is not None and count != shape.moe.num_experts:
            raise Refused(
                f"--lora-moe-shared: one pair of factors is for all experts, but only {count} of "
                f"{shape.moe.num_experts} get an adapter in {name}; name all or leave the flag out"
            )
    return tuple(found.values())


def _check_shared(config: AdapterConfig, module: str, names: tuple[str, ...], targeted: list[str]) -> None:
    """One A is one rank and one scaling for all of a linear's matrices."""
    linear, last = linear_kind(module), [name.rpartition(".")[2] for name in names]
    left_out = [name for name in names if name not in targeted]
    if left_out:
        raise Refused(
            f"{linear} is one adapter for {', '.join(last)}, but {left_out[0]} is left out of it; name the ones "
            f"that are wanted ({' '.join(one.rpartition('.')[2] for one in targeted)}) in place of {linear}"
        )
    for what, values in (
        ("rank", {config.rank_of(name) for name in names}),
        ("alpha", {config.alpha_of(name) for name in names}),
    ):
        if len(values) > 1:
            raise Refused(
                f"{linear} is one adapter for {', '.join(last)}, but --lora-{what}-pattern gives them "
                f"{' and '.join(f'{value:g}' for value in sorted(values))} in {module}; name {' '.join(last)} in "
                f"place of {linear}"
            )
