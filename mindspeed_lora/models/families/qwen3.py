"""Qwen3 (dense): Llama's tensors, with RMSNorm over each query and key head."""

from __future__ import annotations

from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.models.families.config_json import Config, shape_fields
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.llama import LLAMA_TABLE
from mindspeed_lora.models.families.mapping import Direct
from mindspeed_lora.models.families.qwen2 import refuse_sliding_window


def from_config(config: Config) -> ModelShape:
    """Read a Qwen3 config.json; ``attention_bias`` puts a bias on q, k, v and o."""
    refuse_sliding_window(config)
    bias = bool(config.get("attention_bias", False))
    return ModelShape(
        family="qwen3",
        **shape_fields(config, default_head=128, default_groups=32),
        add_qkv_bias=bias,
        add_proj_bias=bias,
        qk_layernorm=True,
    )


FAMILY = Family(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    aliases=("qwen3",),
    from_config=from_config,
    table=(
        *LLAMA_TABLE,
        *(
            Direct(
                f"decoder.layers.{{layer}}.self_attention.{name}_layernorm.weight",
                (f"model.layers.{{layer}}.self_attn.{name}_norm.weight",),
            )
            for name in "qk"
        ),
    ),
)
