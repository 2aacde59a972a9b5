"""Experts by PEFT's names: a module for each matrix of each expert, or one 3-D parameter for all of a layer.

transformers 4 has a linear for each (``model.layers.3.mlp.experts.7.gate_proj``), which is also how every family's
files are named. transformers 5 has ``mlp.experts.gate_up_proj`` ``[E, 2f, h]`` and ``mlp.experts.down_proj``
``[E, h, f]``, and PEFT (0.21) adapts them by ``target_parameters``. It also takes a plain linear's ``weight`` there.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version

PER_EXPERT = "per-expert"
FUSED = "fused"

GATE_UP = "gate_up_proj"
DOWN = "down_proj"
_PARAMETERS = {"gate_proj": GATE_UP, "up_proj": GATE_UP, "w1": GATE_UP, "w3": GATE_UP, DOWN: DOWN, "w2": DOWN}
"""Last component of an expert's module → the parameter that its matrix is part of."""
_EXPERT = re.compile(r"(?P<experts>(?:.+\.)?experts)\.\d+\.(?P<matrix>\w+)")
_OF_TRANSFORMERS_4 = ".block_sparse_moe."


def is_expert(module: str) -> bool:
    """Whether a full Hugging Face module name is that of a matrix of one expert."""
    return _EXPERT.fullmatch(module) is not None


def without_number(module: str) -> str:
    """The name of an expert's matrix without the expert's number (``model.layers.3.mlp.experts.gate_proj``)."""
    match = _EXPERT.fullmatch(module)
    return module if match is None else f"{match['experts']}.{match['matrix']}"


def todays_module(module: str) -> str:
    """The name in transformers 5 of a module that its family's files name otherwise (Mixtral's ``mlp``)."""
    return module.replace(_OF_TRANSFORMERS_4, ".mlp.")


@cache
def parameter_of(module: str) -> str:
    """Full name of the parameter in transformers 5 that a module's matrix is, or is part of."""
    match = _EXPERT.fullmatch(module)
    if match is None:
        return f"{todays_module(module)}.weight"
    return f"{todays_module(match['experts'])}.{_PARAMETERS[match['matrix']]}"


def names_per_expert(name: str) -> bool:
    """Whether a tensor's name is one that only the form of transformers 4 has."""
    return re.search(r"\.experts\.\d+\.", name) is not None or _OF_TRANSFORMERS_4 in name


def installed_moe_format() -> str:
    """The form that the installed transformers and PEFT load for every family: per expert before transformers 5.

    From 5 on, PEFT translates per-expert files for some families, and drops factors of dense and shared MLPs then.
    """
    try:
        major = int(version("transformers").partition(".")[0])
    except (PackageNotFoundError, ValueError):
        return FUSED
    return FUSED if major >= 5 else PER_EXPERT
