"""``--lora-modules-to-save`` in PEFT's form: Megatron's and Hugging Face's names and expressions over either.

A name is tried as Megatron's first (``output_layer``, ``final_layernorm``, ``embedding``: a module, one that holds it,
or the end of such a name), then as PEFT takes it (the end of a Hugging Face name, ``norm`` for all norms), then as a
regular expression over whole canonical names, then over whole Hugging Face names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence

from mindspeed_lora.checkpoint.canonical import canonical_tensors
from mindspeed_lora.checkpoint.peft.rules import faulty_expression, holders, is_saved, is_suffix
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES

FLAG = "--lora-modules-to-save"
Modules = Mapping[str, tuple[str, ...]]
"""Canonical module → full Hugging Face names of the modules that it is made of."""


def peft_modules_to_save(names: Sequence[str] | None, shape: ModelShape) -> tuple[str, ...]:
    """``modules_to_save`` for what the flag names.

    Raises:
        Refused: a name means no module.
    """
    modules = _modules(shape)
    found: list[str] = []
    for name in names or ():
        found += _meant(name, modules)
    return tuple(dict.fromkeys(found))


def hf_modules(shape: ModelShape) -> list[str]:
    """Full Hugging Face names of all modules with parameters."""
    return [name for names in _modules(shape).values() for name in names]


def _modules(shape: ModelShape) -> Modules:
    """Whether or not the output layer has a tensor of its own."""
    family, found = FAMILIES[shape.family], {}
    untied = dataclasses.replace(shape, untie_embeddings_and_output_weights=True)
    for name in canonical_tensors(untied):
        mapping, layer = family.mapping(name)
        found[name.rpartition(".")[0]] = tuple(part.rpartition(".")[0] for part in mapping.names(layer))
    return found


def _meant(name: str, modules: Modules) -> Sequence[str]:
    """PEFT's names for one name or expression of the flag."""
    everything = [module for names in modules.values() for module in names]
    of_megatron = _chosen(modules, lambda module: any(is_suffix(name, holder) for holder in holders(module)))
    if of_megatron:
        same = set(of_megatron) == {module for module in everything if is_saved([name], module)}
        return [name] if same else _shortest(of_megatron, everything)
    if any(is_saved([name], module) for module in everything if name):
        return [name]
    fault = faulty_expression([name])
    if fault is None:
        found = _chosen(modules, lambda module: re.fullmatch(name, module) is not None)
        found = found or [module for module in everything if re.fullmatch(name, module)]
        if found:
            return _shortest(found, everything)
    kinds = dict.fromkeys(module.rpartition(".")[2] for module in (*modules, *everything))
    raise Refused(f"{FLAG}: the model has no module {name}; it has {', '.join(kinds)}")


def _chosen(modules: Modules, test: Callable[[str], bool]) -> list[str]:
    return [name for module, names in modules.items() if test(module) for name in names]


def _shortest(chosen: Collection[str], everything: Collection[str]) -> list[str]:
    """Last components, where PEFT takes them for nothing else; else full names."""
    wanted, names = set(chosen), []
    # By last component: whether PEFT takes it for nothing else.
    alone: dict[str, bool] = {}
    for module in chosen:
        last = module.rpartition(".")[2]
        if last not in alone:
            alone[last] = all(other in wanted for other in everything if is_saved([last], other))
        names.append(last if alone[last] else module)
    return list(dict.fromkeys(names))
