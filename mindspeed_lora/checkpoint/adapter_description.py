"""From an adapter's configuration to its description on one model: which pairs of factors, over which rows.

A fused linear (``linear_qkv``, ``linear_fc1``) takes either one pair, whose A its matrices share, or a pair for
each of its matrices that is a target. PEFT's files do not tell the two apart: the caller says which linears share.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from mindspeed_lora.adapters.spec import AdapterSpec, PartSpec
from mindspeed_lora.checkpoint.canonical import adapter_modules, linear_shapes
from mindspeed_lora.checkpoint.peft_config import AdapterConfig
from mindspeed_lora.checkpoint.token_rows import token_rows
from mindspeed_lora.checkpoint.trained_tensors import trained_tensors, unties
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES

FUSED = ("linear_qkv", "linear_fc1")
"""Megatron's names of the linears that hold several Hugging Face matrices."""


def describe_adapter(config: AdapterConfig, shape: ModelShape, shared: Collection[str]) -> AdapterSpec:
    """The description of an adapter on a model of this shape.

    Args:
        config: what is targeted, with which ranks and alphas.
        shape: the model's, without the adapter but with its vocabulary.
        shared: the fused linears, by Megatron's names, whose matrices share one A.

    Raises:
        Refused: nothing is targeted, or one pair of factors would need several ranks or scalings.
    """
    parts = [
        part
        for module in adapter_modules(shape.num_layers)
        for part in _parts(config, shape, module, module.rpartition(".")[2] in shared)
    ]
    return AdapterSpec(
        parts=tuple(parts),
        dropout=config.dropout,
        trained=trained_tensors(config, shape),
        token_rows=token_rows(config, shape),
        untied=unties(config, shape),
    )


def hf_linears(family: str, num_layers: int) -> dict[str, tuple[str, ...]]:
    """Canonical linear → full Hugging Face names of its matrices, in the order of the forward pass."""
    linears = {}
    for module in adapter_modules(num_layers):
        mapping, layer = FAMILIES[family].mapping(f"{module}.weight")
        linears[module] = mapping.modules(layer)
    return linears


def _parts(config: AdapterConfig, shape: ModelShape, module: str, shared: bool) -> Iterator[PartSpec]:
    mapping, layer = FAMILIES[shape.family].mapping(f"{module}.weight")
    names = mapping.modules(layer)
    rows, columns = linear_shapes(shape)[module.rpartition(".")[2]]
    targeted = [name for name in names if config.targets(name)]
    if not targeted:
        return
    if len(names) == 1 or shared:
        _check_shared(config, module, names, targeted)
        yield _part(config, module, "", names, (rows, columns))
        return
    for name, size in zip(names, mapping.hf_shapes(shape, (rows, columns)), strict=True):
        if name in targeted:
            yield _part(config, module, name.rpartition(".")[2], (name,), (size[0], columns))


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


def _check_shared(config: AdapterConfig, module: str, names: tuple[str, ...], targeted: list[str]) -> None:
    """One A is one rank and one scaling for all of a linear's matrices."""
    linear, last = module.rpartition(".")[2], [name.rpartition(".")[2] for name in names]
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
