"""Mixtral 8x7B and 8x22B: Mistral's attention, and experts in every layer whose files keep names of their own."""

from __future__ import annotations

from typing import Any

from mindspeed_lora.models.families.config_json import Config, shape_fields
from mindspeed_lora.models.families.experts import STACKED, moe_shape, number_of_experts
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.table import LAYER, DecoderNames, ExpertNames

_EXPERT = "block_sparse_moe.experts.{expert}"


def fields(config: Config) -> dict[str, Any]:
    """Read a Mixtral config.json; the scores of the experts that a token takes are divided by their sum."""
    config = {
        **config,
        "rope_theta": config.get("rope_theta") or 1e6,
        "rms_norm_eps": config.get("rms_norm_eps") or 1e-5,
    }
    jitter = {"moe_input_jitter_eps": float(config.get("router_jitter_noise") or 0.0)}
    return {
        **shape_fields(config, default_groups=8, windowed=True, features=jitter),
        "moe": moe_shape(
            config,
            num_experts=number_of_experts(config, "num_local_experts", "num_experts"),
            width_key="intermediate_size",
            topk=2,
            aux_loss_coeff=0.001,
        ),
    }


FAMILIES = (
    Family(
        name="mixtral",
        model_type="mixtral",
        architectures=("MixtralForCausalLM",),
        aliases=("mixtral",),
        fields=fields,
        table=DecoderNames(
            experts=ExpertNames(
                router="block_sparse_moe.gate",
                linear_fc1=(f"{_EXPERT}.w1", f"{_EXPERT}.w3"),
                linear_fc2=f"{_EXPERT}.w2",
            )
        ).table(),
        also_stored_as={**STACKED, f"{LAYER}.mlp.router.weight": "model.layers.{layer}.mlp.gate.weight"},
    ),
)
