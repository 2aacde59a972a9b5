"""Qwen3 (dense): Llama's tensors, with RMSNorm over each query and key head."""

from __future__ import annotations

from typing import Any

from mindspeed_lora.models.families.config_json import Config, shape_fields
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.table import HEAD_NORMS, LLAMA_NORMS, DecoderNames


def fields(config: Config) -> dict[str, Any]:
    """Read a Qwen3 config.json; ``attention_bias`` puts a bias on q, k, v and o."""
    bias = bool(config.get("attention_bias", False))
    return {
        **shape_fields(config, default_head=128, default_groups=32),
        "add_qkv_bias": bias,
        "add_proj_bias": bias,
        "qk_layernorm": True,
    }


FAMILIES = (
    Family(
        name="qwen3",
        model_type="qwen3",
        architectures=("Qwen3ForCausalLM",),
        aliases=("qwen3", "llama2"),
        fields=fields,
        table=DecoderNames(norms={**LLAMA_NORMS, **HEAD_NORMS}).table(),
    ),
)
