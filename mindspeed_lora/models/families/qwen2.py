"""Qwen1.5, Qwen2 and Qwen2.5 (dense): Llama's tensors, with a bias on q, k and v alone."""

from __future__ import annotations

from typing import Any

from mindspeed_lora.models.families.config_json import Config, shape_fields
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.llama import LLAMA_TABLE


def fields(config: Config) -> dict[str, Any]:
    """Read a Qwen2 config.json."""
    return {**shape_fields(config, default_groups=32), "add_qkv_bias": True}


FAMILIES = (
    Family(
        name="qwen2",
        model_type="qwen2",
        architectures=("Qwen2ForCausalLM",),
        aliases=("qwen", "qwen15", "qwen1.5", "qwen2", "qwen25", "qwen2.5", "llama2"),
        fields=fields,
        table=LLAMA_TABLE,
    ),
)
