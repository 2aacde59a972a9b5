"""One file per Hugging Face model family: how its config.json is read and its table of tensor names."""

from __future__ import annotations

from typing import Any

from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import llama, mistral, qwen2, qwen3
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.mapping import Mapping

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in (llama, mistral, qwen2, qwen3)}

LLAMA_LIKE = ("llama2",)
"""Values of ``--model-type-hf`` with which people's scripts convert every model of Llama's kind."""

__all__ = ["FAMILIES", "Family", "Mapping", "check_model_type_hf", "family_for", "shape_from_config"]


def family_for(config: dict[str, Any]) -> Family:
    """Find the family of a parsed config.json by its ``model_type`` and ``architectures``."""
    model_type = config.get("model_type")
    family = next((one for one in FAMILIES.values() if one.model_type == model_type), None)
    if family is None:
        known = ", ".join(one.model_type for one in FAMILIES.values())
        raise Refused(f"config.json: model_type '{model_type}' is not supported; supported are {known}.")
    architectures = config.get("architectures") or [family.architecture]
    if family.architecture not in architectures:
        raise Refused(
            f"config.json: architectures {', '.join(architectures)} is not supported; "
            f"expected {family.architecture}."
        )
    return family


def shape_from_config(config: dict[str, Any]) -> ModelShape:
    """The resolved architecture that a parsed config.json describes."""
    try:
        return family_for(config).from_config(config)
    except (TypeError, ValueError, AttributeError) as error:
        raise Refused(f"config.json: a value has an unexpected type ({error}).") from error


def check_model_type_hf(value: str | None, family: str) -> None:
    """Refuse a ``--model-type-hf`` that contradicts the family that was found."""
    if value is None or value in LLAMA_LIKE or value in FAMILIES[family].aliases:
        return
    raise Refused(
        f"--model-type-hf {value} contradicts the checkpoint, which is a {family} model; leave it out."
    )
