"""Mistral 7B: Llama's tensors, with a sliding attention window in its first version."""

from __future__ import annotations

from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families.config_json import Config, shape_fields
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.llama import LLAMA_TABLE


def from_config(config: Config) -> ModelShape:
    """Read a Mistral config.json; ``sliding_window`` applies to every layer, null means none."""
    window = config.get("sliding_window")
    if window is not None and int(window) < 1:
        raise Refused(
            f"config.json: sliding_window {window} is not a window; expected a positive number or null."
        )
    return ModelShape(
        family="mistral",
        **shape_fields(config, default_groups=8),
        sliding_window=None if window is None else int(window),
    )


FAMILY = Family(
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    aliases=("mistral",),
    from_config=from_config,
    table=LLAMA_TABLE,
)
