"""GLM-4.5 and GLM-4.5-Air: DeepSeek-V3's routing (sigmoid, bias on the choice, groups) with grouped queries.

The layers behind the last one that predict further tokens (``num_nextn_predict_layers``) are no part of the model.
"""

from __future__ import annotations

from typing import Any

from mindspeed_lora.models.families.config_json import Config, required, rope_parameters, shape_fields
from mindspeed_lora.models.families.experts import STACKED, moe_shape, number_of_experts
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.table import HEAD_NORMS, LLAMA_NORMS, DecoderNames, ExpertNames


def fields(config: Config) -> dict[str, Any]:
    """Read a GLM-4.5 config.json; ``attention_bias`` covers q, k and v alone, half of each head is rotated."""
    share = rope_parameters(config).get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
    config = {
        **config,
        "partial_rotary_factor": share,
        "rms_norm_eps": config.get("rms_norm_eps") or 1e-5,
    }
    width, shared = int(required(config, "moe_intermediate_size")), config.get("n_shared_experts", 1)
    dense = int(config.get("first_k_dense_replace", 1))
    return {
        **shape_fields(config, default_groups=8),
        "add_qkv_bias": bool(config.get("attention_bias", False)),
        "qk_layernorm": bool(config.get("use_qk_norm", False)),
        "moe": moe_shape(
            config,
            num_experts=number_of_experts(config, "n_routed_experts", "num_local_experts"),
            width_key="moe_intermediate_size",
            topk=8,
            dense_layers=tuple(range(min(dense, int(required(config, "num_hidden_layers"))))),
            shared_ffn_hidden_size=width * int(shared or 0),
            score_function="sigmoid",
            normalise=bool(config.get("norm_topk_prob", True)),
            scaling_factor=float(config.get("routed_scaling_factor", 1.0)),
            expert_bias=True,
            num_groups=int(config.get("n_group") or 1),
            group_topk=int(config.get("topk_group") or 1),
            group_score="top2",
        ),
    }


FAMILIES = (
    Family(
        name="glm4_moe",
        model_type="glm4_moe",
        architectures=("Glm4MoeForCausalLM",),
        aliases=("glm45-moe", "glm45", "glm45-air", "glm4-moe", "glm4_moe"),
        fields=fields,
        table=DecoderNames(
            norms={**LLAMA_NORMS, **HEAD_NORMS},
            experts=ExpertNames(expert_bias="mlp.gate.e_score_correction_bias", shared="mlp.shared_experts"),
        ).table(),
        also_stored_as=STACKED,
    ),
)
