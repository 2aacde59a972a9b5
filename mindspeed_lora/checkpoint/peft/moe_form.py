"""An adapter's configuration in either form of experts (``--peft-moe-format``): its targets named anew.

PEFT 0.21 on transformers 5 rewrites ``target_modules`` that end in ``gate_proj``, ``up_proj``, ``down_proj`` or
``gate`` to the experts' parameters, and so loses the dense and shared MLPs and the routers of these names. In the fused
form they are named by their ``weight`` in ``target_parameters`` instead; their factors lie in the file under the same
names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from mindspeed_lora.checkpoint.peft.chosen_names import pattern_of, places, shortest_names
from mindspeed_lora.checkpoint.peft.config import AdapterConfig
from mindspeed_lora.checkpoint.peft.expert_names import (
    FUSED,
    GATE_UP,
    PER_EXPERT,
    installed_moe_format,
    is_expert,
    parameter_of,
    todays_module,
)
from mindspeed_lora.errors import Refused

Linears = Mapping[str, tuple[str, ...]]
"""Canonical linear → full Hugging Face names of its matrices."""

_REWRITTEN = ("gate_proj", "up_proj", "down_proj", "gate")
"""Last components of modules that PEFT takes for those of experts."""


def chosen_moe_format(
    config: AdapterConfig, linears: Linears, wanted: str | None, separate: bool
) -> AdapterConfig:
    """The same adapter in the form of ``--peft-moe-format``.

    Left out, it is what the installed transformers load, or per expert where that form cannot say it.
    """
    try:
        return in_moe_format(config, linears, wanted or installed_moe_format(), separate)
    except Refused:
        if wanted is not None:
            raise
        return in_moe_format(config, linears, PER_EXPERT, separate)


def in_moe_format(config: AdapterConfig, linears: Linears, form: str, separate: bool) -> AdapterConfig:
    """The same adapter with its names in this form.

    Args:
        config: in any form.
        linears: of the model.
        form: ``per-expert`` or ``fused``.
        separate: gate and up of the experts have factors of their own, not one A.

    Raises:
        Refused: the form cannot say it.
    """
    matrices = [name for names in linears.values() for name in names]
    targeted = [name for name in matrices if config.targets(name)]
    saved = _modules_to_save(config.modules_to_save, matrices, form)
    if form == PER_EXPERT:
        ranks, alphas = _values(config, {name: [name] for name in targeted})
        return dataclasses.replace(
            config,
            moe_format=PER_EXPERT,
            separate_gate_up=False,
            target_modules=shortest_names(targeted, matrices),
            target_parameters=(),
            rank_pattern=pattern_of(ranks, config.r, matrices),
            alpha_pattern=pattern_of(alphas, config.alpha, matrices),
            modules_to_save=saved,
        )
    members: dict[str, list[str]] = {}
    for name in matrices:
        members.setdefault(_fused_name(name), []).append(name)
    chosen = {name: members[name] for name in dict.fromkeys(map(_fused_name, targeted))}
    _check_whole(chosen, set(targeted))
    ranks, alphas = _values(config, chosen)
    if separate:
        _double(config.use_rslora, ranks, alphas)
    parameters = [name for name in chosen if _is_parameter(name, chosen)]
    modules = [name for name in chosen if not _is_parameter(name, chosen)]
    return dataclasses.replace(
        config,
        moe_format=FUSED,
        separate_gate_up=separate and any(name.endswith(GATE_UP) for name in parameters),
        target_modules=shortest_names(modules, members),
        target_parameters=places(parameters, members),
        rank_pattern=pattern_of(ranks, config.r, members),
        alpha_pattern=pattern_of(alphas, config.alpha, members),
        modules_to_save=saved,
    )


def _fused_name(module: str) -> str:
    """What the fused form names for a matrix: a parameter, or the module."""
    by_parameter = is_expert(module) or module.rpartition(".")[2] in _REWRITTEN
    return parameter_of(module) if by_parameter else todays_module(module)


def _is_parameter(name: str, members: Mapping[str, list[str]]) -> bool:
    return name != todays_module(members[name][0])


def _check_whole(chosen: Mapping[str, list[str]], targeted: set[str]) -> None:
    """A parameter has one pair of factors for all that it holds."""
    for parameter, names in chosen.items():
        left_out = [name for name in names if name not in targeted]
        if left_out:
            raise Refused(
                f"--peft-moe-format fused: {parameter} is one parameter for all experts of its layer, but the adapter "
                f"leaves out {left_out[0]}; give --peft-moe-format per-expert"
            )


def _values(
    config: AdapterConfig, members: Mapping[str, list[str]]
) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and alpha of each name, the same for all that it holds."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, modules in members.items():
        for what, found, value_of in (
            ("rank", ranks, config.rank_of),
            ("alpha", alphas, config.alpha_of),
        ):
            values = {value_of(module) for module in modules}
            if len(values) > 1:
                raise Refused(
                    f"--peft-moe-format fused: {name} is one parameter with one {what}, but the adapter has "
                    f"{' and '.join(f'{value:g}' for value in sorted(values))} on what it holds; give "
                    "--peft-moe-format per-expert"
                )
            found[name] = values.pop()  # type: ignore[assignment]
    return ranks, alphas


def _double(use_rslora: bool, ranks: dict[str, int], alphas: dict[str, float]) -> None:
    """Twice the rank for gate's and up's own factors, at the same scaling."""
    for name in ranks:
        if name.endswith(f".{GATE_UP}"):
            ranks[name] *= 2
            alphas[name] *= math.sqrt(2) if use_rslora else 2


def _modules_to_save(names: tuple[str, ...], matrices: list[str], form: str) -> tuple[str, ...]:
    """Their names in this form, where the family's files have others than transformers 5."""
    if not any(todays_module(name) != name for name in matrices):
        return names
    old, new = ("block_sparse_moe", "mlp") if form == FUSED else ("mlp", "block_sparse_moe")
    return tuple(
        ".".join(new if component == old else component for component in name.split(".")) for name in names
    )
