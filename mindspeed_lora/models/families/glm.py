"""GLM-4 as transformers has it: ``glm`` (GLM-4-9B) and ``glm4`` (GLM-4-0414, with norms over the outputs too)."""

from __future__ import annotations

from typing import Any

from mindspeed_lora.models.families.config_json import Config, rope_parameters, shape_fields
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.table import LLAMA_NORMS, DecoderNames

_GATE_UP = ("mlp.gate_up_proj",)


def fields(config: Config) -> dict[str, Any]:
    """Read a GLM config.json; ``attention_bias`` covers q, k and v alone, half of each head is rotated."""
    share = rope_parameters(config).get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
    config = {**config, "partial_rotary_factor": share}
    return {
        **shape_fields(config, default_groups=2, default_head=128, features={"rotary_interleaved": True}),
        "add_qkv_bias": bool(config.get("attention_bias", True)),
    }


def fields_of_glm4(config: Config) -> dict[str, Any]:
    """Read a GLM-4-0414 config.json."""
    return {**fields(config), "post_norm": True}


FAMILIES = (
    Family(
        name="glm",
        model_type="glm",
        architectures=("GlmForCausalLM",),
        aliases=("glm", "glm4"),
        fields=fields,
        table=DecoderNames(linear_fc1=_GATE_UP).table(),
    ),
    Family(
        name="glm4",
        model_type="glm4",
        architectures=("Glm4ForCausalLM",),
        aliases=("glm4",),
        fields=fields_of_glm4,
        table=DecoderNames(
            linear_fc1=_GATE_UP,
            norms={
                **LLAMA_NORMS,
                "post_attn_norm": "post_self_attn_layernorm",
                "post_mlp_layernorm": "post_mlp_layernorm",
            },
        ).table(),
    ),
)
