"""ChatGLM2, ChatGLM3 and GLM-4-9B in their own code: q, k and v stacked in one matrix, gate and up in another."""

from __future__ import annotations

from typing import Any

from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families.config_json import Config, shape_fields
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.table import LLAMA_NORMS, DecoderNames

_EXPECTED = {
    "rmsnorm": (True,),
    "post_layer_norm": (True,),
    "interleaved_qkv": (False,),
    "quantization_bit": (0, None),
    "pre_seq_len": (None,),
}
"""Keys that change the tensors, with the values of the published models; the first is that of a missing key."""


def fields(config: Config) -> dict[str, Any]:
    """Read a ChatGLM config.json: half of each head is rotated, in neighbouring pairs."""
    for key, values in _EXPECTED.items():
        if config.get(key, values[0]) not in values:
            raise Refused(f"config.json: {key} {config[key]} is not supported; expected {values[0]}.")
    if not config.get("multi_query_attention", False):
        config = {**config, "num_key_value_heads": None}
    bias = bool(config.get("add_bias_linear", False))
    post_norm_residual = "apply_residual_connection_post_layernorm"
    features = {
        "rotary_interleaved": True,
        post_norm_residual: bool(config.get(post_norm_residual, False)),
    }
    return {
        **shape_fields(config, features=features),
        "rotary_percent": 0.5,
        "rotary_base": 10000.0 * float(config.get("rope_ratio") or 1.0),
        "hidden_dropout": float(config.get("hidden_dropout") or 0.0),
        "add_qkv_bias": bias or bool(config.get("add_qkv_bias", False)),
        "add_proj_bias": bias,
        "add_mlp_bias": bias,
    }


FAMILIES = (
    Family(
        name="chatglm",
        model_type="chatglm",
        architectures=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
        aliases=("chatglm", "chatglm2", "chatglm3", "glm4"),
        fields=fields,
        table=DecoderNames(
            embedding="transformer.embedding.word_embeddings",
            layer="transformer.encoder.layers.{layer}",
            norms=LLAMA_NORMS,
            linear_qkv=("self_attention.query_key_value",),
            linear_proj="self_attention.dense",
            linear_fc1=("mlp.dense_h_to_4h",),
            linear_fc2="mlp.dense_4h_to_h",
            final_layernorm="transformer.encoder.final_layernorm",
            output_layer="transformer.output_layer",
        ).table(),
        config_keys={
            "num_hidden_layers": "num_layers",
            "intermediate_size": "ffn_hidden_size",
            "vocab_size": "padded_vocab_size",
            "max_position_embeddings": "seq_length",
            "rms_norm_eps": "layernorm_epsilon",
            "head_dim": "kv_channels",
            "num_key_value_heads": "multi_query_group_num",
        },
    ),
)
