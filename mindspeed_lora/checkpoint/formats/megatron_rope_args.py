"""The scaling of rotary positions in the ``args`` of Megatron checkpoints, both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from mindspeed_lora.config.model_features import FEATURES
from mindspeed_lora.config.rotary_flags import LONGROPE
from mindspeed_lora.config.shape import RopeScaling

_OF_LONGROPE = ("short_factor", "long_factor", "short_mscale", "long_mscale")
_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(RopeScaling)
    if field.name not in ("rope_type", "factor", *_OF_LONGROPE)
)
"""Values of the scaling that ``args`` have under their own names."""
_ORIGINAL = ("original_max_position_embeddings", "rope_scaling_original_max_position_embeddings")
"""The second is MindSpeed-LLM's, of yarn and longrope."""


def rope_args(scaling: RopeScaling | None) -> dict[str, Any]:
    """What ``args`` tell of a scaling."""
    if scaling is None:
        return {"rope_scaling_type": None, "use_rope_scaling": False}
    own: dict[str, Any] = {}
    if scaling.rope_type == LONGROPE:
        own = {name: getattr(scaling, name) for name in _OF_LONGROPE}
        own |= {name: list(value) for name, value in own.items() if isinstance(value, tuple)}
        own[_ORIGINAL[1]] = scaling.original_max_position_embeddings
    return {
        "rope_scaling_type": scaling.rope_type,
        "use_rope_scaling": scaling.rope_type == "llama3",
        "rope_scaling_factor": scaling.factor,
        **{name: getattr(scaling, name) for name in _FIELDS},
        **own,
    }


def rope_from_args(values: dict[str, Any]) -> RopeScaling | None:
    """The scaling that ``args`` tell, if it is a built one."""
    kind = values.get("rope_scaling_type") or ("llama3" if values.get("use_rope_scaling") else None)
    if kind not in FEATURES["rope_scaling_type"].plain or kind in (None, "default"):
        return None
    original = next((values[name] for name in _ORIGINAL if values.get(name)), None)
    if kind == LONGROPE:
        return _longrope(values, int(original or values["max_position_embeddings"]))
    further = {}
    if kind == "yarn":
        # Megatron-LM has defaults of these for every model.
        told = {name: values.get(f"rope_scaling_{name}", values.get(name)) for name in _FIELDS}
        further = {
            name: value
            for name, value in told.items()
            if value is not None
            and name not in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        }
    return RopeScaling(
        rope_type=kind,
        factor=float(values.get("rope_scaling_factor") or 8.0),
        low_freq_factor=float(values.get("low_freq_factor") or 1.0),
        high_freq_factor=float(values.get("high_freq_factor") or 4.0),
        original_max_position_embeddings=int(original or 8192),
        **further,
    )


def _longrope(values: dict[str, Any], original: int) -> RopeScaling:
    """MindSpeed-LLM's ``args`` have no factor of it, but Megatron-LM's default: it follows from the positions."""
    lists = {name: _numbers(values.get(name)) for name in ("short_factor", "long_factor")}
    told: dict[str, Any] = {
        name: float(values[name])
        for name in ("short_mscale", "long_mscale", "attention_factor")
        if values.get(name) is not None
    }
    return RopeScaling(
        rope_type=LONGROPE,
        factor=values["max_position_embeddings"] / original,
        original_max_position_embeddings=original,
        short_factor=lists["short_factor"],
        long_factor=lists["long_factor"],
        **told,
    )


def _numbers(value: str | Collection[float] | None) -> tuple[float, ...]:
    """Of a list, or of the text that the flag was."""
    return tuple(map(float, value.split(",") if isinstance(value, str) else value or ()))
