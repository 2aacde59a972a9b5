"""Hugging Face model families: how a config.json is read, and the table of a family's tensor names.

A family is one entry of :data:`FAMILIES`, made of a table of a few lines. A file of ``--family-file`` adds one more
for the time of a command (:mod:`mindspeed_lora.models.families.family_file`).
"""

from __future__ import annotations

from typing import Any

from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import (
    baichuan,
    chatglm,
    deepseek,
    gemma,
    glm,
    glm_moe,
    granite,
    internlm2,
    llama,
    minicpm,
    mistral,
    mixtral,
    phi3,
    qwen2,
    qwen3,
    qwen_moe,
)
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.mapping import Mapping

_MODULES = (
    *(llama, mistral, qwen2, qwen3, phi3, gemma, glm, internlm2, minicpm, granite, baichuan, chatglm),
    *(mixtral, qwen_moe, glm_moe, deepseek),
)
FAMILIES: dict[str, Family] = {family.name: family for module in _MODULES for family in module.FAMILIES}
"""By name; where several mean the same, Llama comes first."""

__all__ = ["FAMILIES", "Family", "Mapping", "check_model_type_hf", "family_for", "shape_from_config"]


def family_for(config: dict[str, Any]) -> Family:
    """Find the family of a parsed config.json by its ``model_type`` and ``architectures``."""
    model_type = config.get("model_type")
    family = next((one for one in FAMILIES.values() if one.model_type == model_type), None)
    if model_type is None:
        raise Refused(
            "config.json: model_type is missing; the file does not say which family the model is of."
        )
    if family is None:
        known = ", ".join(one.model_type for one in FAMILIES.values())
        raise Refused(
            f"config.json: model_type '{model_type}' is not supported; supported are {known}, and what "
            "--family-file describes."
        )
    architectures = config.get("architectures") or family.architectures
    if not set(architectures) & set(family.architectures):
        raise Refused(
            f"config.json: architectures {', '.join(architectures)} is not supported; "
            f"expected {' or '.join(family.architectures)}."
        )
    return family


def shape_from_config(config: dict[str, Any]) -> ModelShape:
    """The resolved architecture that a parsed config.json describes."""
    try:
        return family_for(config).shape(config)
    except (TypeError, ValueError, AttributeError) as error:
        raise Refused(f"config.json: a value has an unexpected type ({error}).") from error


def check_model_type_hf(value: str | None, family: str) -> None:
    """Refuse a ``--model-type-hf`` that contradicts the family that was found."""
    if value is None or value == family or value in FAMILIES[family].aliases:
        return
    raise Refused(
        f"--model-type-hf {value} contradicts the checkpoint, which is a {family} model; leave it out."
    )


def check_w_pack(given: bool | None, family: str) -> None:
    """Refuse a ``--w-pack`` for a model whose q, k and v are tensors of their own."""
    if given and not FAMILIES[family].packs_qkv:
        raise Refused(
            f"--w-pack contradicts the checkpoint, which is a {family} model with q, k and v in tensors of their own; "
            "leave it out."
        )
