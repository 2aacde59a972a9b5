"""Mistral 7B: Llama's tensors, with a sliding attention window in its first version."""

from __future__ import annotations

from typing import Any

from mindspeed_lora.models.families.config_json import Config, shape_fields
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.llama import LLAMA_TABLE


def fields(config: Config) -> dict[str, Any]:
    """Read a Mistral config.json; ``sliding_window`` applies to every layer, null means none."""
    return shape_fields(config, default_groups=8, windowed=True)


FAMILIES = (
    Family(
        name="mistral",
        model_type="mistral",
        architectures=("MistralForCausalLM",),
        aliases=("mistral", "llama2"),
        fields=fields,
        table=LLAMA_TABLE,
    ),
)
