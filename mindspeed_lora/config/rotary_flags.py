"""The scaling of rotary positions: its flags against a checkpoint, from flags alone, and whether it fits the model."""

from __future__ import annotations

import math
from typing import Any

from mindspeed_lora.config.model import ModelConfig, numbers
from mindspeed_lora.config.shape import ModelShape, RopeScaling
from mindspeed_lora.errors import Refused

_COMPARED = {
    "rope_scaling_type": "rope_type",
    "rope_scaling_factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "rope_scaling_mscale": "mscale",
    "rope_scaling_mscale_all_dim": "mscale_all_dim",
    "short_mscale": "short_mscale",
    "long_mscale": "long_mscale",
}
"""Field of the flags → field of the scaling."""
_LISTS = ("short_factor", "long_factor")
LONGROPE = "longrope"


def differing_rotary(model: ModelConfig, shape: ModelShape) -> list[tuple[str, Any, Any]]:
    """Flag, its value and the shape's, where a flag is given and they are not the same."""
    scaling = shape.rope_scaling
    pairs = [
        (flag, given, None if scaling is None else getattr(scaling, name))
        for flag, name in _COMPARED.items()
        if (given := getattr(model, flag)) is not None
    ]
    differing: list[tuple[str, Any, Any]] = [pair for pair in pairs if not same_value(*pair[1:])]
    for name in _LISTS:
        text = getattr(model, name)
        found = () if scaling is None else getattr(scaling, name)
        if text is not None and not _same_numbers(numbers(text), found):
            differing.append((name, True, "other numbers" if found else None))
    return differing


def same_value(given: Any, found: Any) -> bool:
    """Whether a flag's value is the shape's; floats may differ by how they were written."""
    if isinstance(given, float) and isinstance(found, (int, float)):
        return math.isclose(given, found, rel_tol=1e-6)
    return bool(given == found)


def _same_numbers(given: tuple[float, ...], found: tuple[float, ...]) -> bool:
    return len(given) == len(found) and all(map(same_value, given, found))


def rope_scaling_from_flags(model: ModelConfig, positions: int) -> RopeScaling | None:
    """The scaling of a model of so many positions whose shape the flags tell.

    Raises:
        Refused: a flag is missing that the scaling needs.
    """
    kind = model.rope_scaling_type
    if kind is None:
        if model.rope_scaling_factor is not None:
            raise Refused(
                f"--rope-scaling-factor {model.rope_scaling_factor:g} needs --rope-scaling-type; add it"
            )
        return None
    needed = ["rope_scaling_factor"] if kind != LONGROPE else ["original_max_position_embeddings", *_LISTS]
    missing = [f"--{name.replace('_', '-')}" for name in needed if getattr(model, name) is None]
    if missing:
        raise Refused(
            f"--rope-scaling-type {kind} needs {', '.join(missing)}; add {'it' if len(missing) == 1 else 'them'}"
        )
    given = {name: value for flag, name in _COMPARED.items() if (value := getattr(model, flag)) is not None}
    if kind == LONGROPE:
        given["factor"] = positions / given["original_max_position_embeddings"]
        given |= {name: numbers(getattr(model, name)) for name in _LISTS}
        if len({"short_mscale", "long_mscale"} & given.keys()) == 1:
            raise Refused("--short-mscale and --long-mscale are given together or not at all; one is missing")
    return RopeScaling(**given)


def check_rotary(shape: ModelShape) -> None:
    """Refuse longrope whose lists do not name every frequency of what is rotated of a head, or over one position."""
    scaling = shape.rope_scaling
    if scaling is None or scaling.rope_type != LONGROPE:
        return
    if scaling.original_max_position_embeddings < 2:
        raise Refused(
            f"original_max_position_embeddings of the model's rotary scaling is "
            f"{scaling.original_max_position_embeddings}; longrope needs 2 or more"
        )
    count = rotary_width(shape) // 2
    for name in _LISTS:
        found = getattr(scaling, name)
        if len(found) != count:
            raise Refused(
                f"{name} of the model's rotary scaling has {len(found)} numbers, and its heads have {count} rotary "
                "frequencies; give one number for each"
            )


def rotary_width(shape: ModelShape) -> int:
    """How many features of a head are rotated."""
    return (
        int(shape.kv_channels * shape.rotary_percent) if shape.mla is None else shape.mla.qk_pos_emb_head_dim
    )
