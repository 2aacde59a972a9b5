"""InternLM2 and 2.5: Llama's computation; ``wqkv`` has q, k and v by query group, as Megatron has them."""

from __future__ import annotations

from typing import Any

from mindspeed_lora.models.families.config_json import Config, shape_fields
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.mapping import Direct
from mindspeed_lora.models.families.table import DecoderNames


def fields(config: Config) -> dict[str, Any]:
    """Read an InternLM2 config.json; ``bias`` covers ``wqkv`` and ``wo``."""
    bias = bool(config.get("bias", True))
    return {**shape_fields(config), "add_qkv_bias": bias, "add_proj_bias": bias}


FAMILIES = (
    Family(
        name="internlm2",
        model_type="internlm2",
        architectures=("InternLM2ForCausalLM",),
        aliases=("internlm2", "internlm2.5", "internlm25"),
        fields=fields,
        table=DecoderNames(
            embedding="model.tok_embeddings",
            norms={"input_layernorm": "attention_norm", "pre_mlp_layernorm": "ffn_norm"},
            linear_qkv=("attention.wqkv",),
            qkv=Direct,
            linear_proj="attention.wo",
            linear_fc1=("feed_forward.w1", "feed_forward.w3"),
            linear_fc2="feed_forward.w2",
            output_layer="output",
        ).table(),
    ),
)
