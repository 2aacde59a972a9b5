"""Qwen1.5-MoE and Qwen2-MoE (a gated shared expert) and Qwen3-MoE (norms over each query and key head)."""

from __future__ import annotations

from typing import Any

from mindspeed_lora.config.shape import MoEShape
from mindspeed_lora.models.families.config_json import Config, required, shape_fields
from mindspeed_lora.models.families.experts import (
    STACKED,
    layers_without_experts,
    moe_shape,
    number_of_experts,
)
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.table import HEAD_NORMS, LLAMA_NORMS, DecoderNames, ExpertNames


def _experts(config: Config, topk: int, **values: Any) -> MoEShape:
    """The experts; a token's weights add up to 1 only where ``norm_topk_prob`` says so."""
    step = config.get("decoder_sparse_step")
    return moe_shape(
        config,
        num_experts=number_of_experts(config, "num_experts", "num_local_experts"),
        width_key="moe_intermediate_size",
        topk=topk,
        normalise=bool(config.get("norm_topk_prob", False)),
        dense_layers=layers_without_experts(
            config, 1 if step is None else int(step), config.get("mlp_only_layers") or ()
        ),
        aux_loss_coeff=0.001,
        **values,
    )


def fields_of_qwen2(config: Config) -> dict[str, Any]:
    """Read a Qwen2-MoE config.json."""
    shared = int(required(config, "shared_expert_intermediate_size"))
    return {
        **shape_fields(config, default_groups=16),
        "add_qkv_bias": bool(config.get("qkv_bias", True)),
        "moe": _experts(config, 4, shared_ffn_hidden_size=shared, shared_expert_gate=True),
    }


def fields_of_qwen3(config: Config) -> dict[str, Any]:
    """Read a Qwen3-MoE config.json; with ``use_sliding_window`` every layer has the window."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    bias = bool(config.get("attention_bias", False))
    return {
        **shape_fields({**config, "sliding_window": window}, default_groups=4, windowed=True),
        "add_qkv_bias": bias,
        "add_proj_bias": bias,
        "qk_layernorm": True,
        "moe": _experts(config, 8),
    }


FAMILIES = (
    Family(
        name="qwen2_moe",
        model_type="qwen2_moe",
        architectures=("Qwen2MoeForCausalLM",),
        aliases=("qwen2-moe", "qwen2_moe", "qwen15-moe", "qwen1.5-moe"),
        fields=fields_of_qwen2,
        table=DecoderNames(
            experts=ExpertNames(shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate")
        ).table(),
        also_stored_as=STACKED,
    ),
    Family(
        name="qwen3_moe",
        model_type="qwen3_moe",
        architectures=("Qwen3MoeForCausalLM",),
        aliases=("qwen3-moe", "qwen3_moe"),
        fields=fields_of_qwen3,
        table=DecoderNames(norms={**LLAMA_NORMS, **HEAD_NORMS}, experts=ExpertNames()).table(),
        also_stored_as=STACKED,
    ),
)
