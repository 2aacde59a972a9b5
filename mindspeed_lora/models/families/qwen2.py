"""Qwen1.5, Qwen2 and Qwen2.5 (dense): Llama's tensors, with a bias on q, k and v alone."""

from __future__ import annotations

from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families.config_json import Config, shape_fields
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.llama import LLAMA_TABLE


def refuse_sliding_window(config: Config) -> None:
    """Refuse Qwen's windows, which hold for the layers above ``max_window_layers`` only."""
    if config.get("use_sliding_window"):
        raise Refused(
            "config.json: use_sliding_window true is not supported; set it to false for full attention."
        )


def from_config(config: Config) -> ModelShape:
    """Read a Qwen2 config.json."""
    refuse_sliding_window(config)
    return ModelShape(family="qwen2", **shape_fields(config, default_groups=32), add_qkv_bias=True)


FAMILY = Family(
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    aliases=("qwen", "qwen15", "qwen1.5", "qwen2", "qwen25", "qwen2.5"),
    from_config=from_config,
    table=LLAMA_TABLE,
)
