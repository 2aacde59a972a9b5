"""Gemma, Gemma 2 and the text models of Gemma 3. Norm weights are stored as they are: what is multiplied is 1 + w."""

from __future__ import annotations

from typing import Any

from mindspeed_lora.models.families.config_json import Config, required, shape_fields
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.llama import LLAMA_TABLE
from mindspeed_lora.models.families.table import HEAD_NORMS, DecoderNames

_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attn_norm": "post_attention_layernorm",
    "pre_mlp_layernorm": "pre_feedforward_layernorm",
    "post_mlp_layernorm": "post_feedforward_layernorm",
}

_OF_GEMMA2 = {
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}


def fields(config: Config) -> dict[str, Any]:
    """Read a Gemma config.json; ``attention_bias`` covers q, k, v and o."""
    bias = bool(config.get("attention_bias", False))
    # An unset or "gelu" activation means GELU's tanh form in all of them.
    config = {**config, "hidden_act": "gelu_pytorch_tanh"}
    features = {"add_rmsnorm_offset": True, "input_embeds_norm": True}
    return {
        **shape_fields(config, default_head=256, tied=True, features=features),
        "add_qkv_bias": bias,
        "add_proj_bias": bias,
    }


def fields_of_gemma2(config: Config) -> dict[str, Any]:
    """Read a Gemma 2 config.json; every second layer has a window. What is not given is as in transformers."""
    return _with_windows({**_OF_GEMMA2, **config}, default_pattern=2)


def fields_of_gemma3(config: Config) -> dict[str, Any]:
    """Read the config.json of a Gemma 3 text model; one layer in ``sliding_window_pattern`` has no window."""
    pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6))
    return {**_with_windows(config, default_pattern=int(pattern)), "qk_layernorm": True}


def _with_windows(config: Config, default_pattern: int) -> dict[str, Any]:
    """transformers 4 writes no ``layer_types``: in one layer of ``default_pattern``, the last, there is no window."""
    number = int(required(config, "num_hidden_layers"))
    kinds = config.get("layer_types") or [
        "sliding_attention" if layer % default_pattern else "full_attention" for layer in range(1, number + 1)
    ]
    return {**fields({**config, "layer_types": kinds}), "post_norm": True}


FAMILIES = (
    Family(
        name="gemma",
        model_type="gemma",
        architectures=("GemmaForCausalLM",),
        aliases=("gemma",),
        fields=fields,
        table=LLAMA_TABLE,
    ),
    Family(
        name="gemma2",
        model_type="gemma2",
        architectures=("Gemma2ForCausalLM",),
        aliases=("gemma2",),
        fields=fields_of_gemma2,
        table=DecoderNames(norms=_NORMS).table(),
    ),
    Family(
        name="gemma3_text",
        model_type="gemma3_text",
        architectures=("Gemma3ForCausalLM",),
        aliases=("gemma3_text", "gemma3"),
        fields=fields_of_gemma3,
        table=DecoderNames(norms={**_NORMS, **HEAD_NORMS}).table(),
    ),
)
