"""Phi-3, Phi-3.5 and Phi-4 (dense): Llama's computation, with q, k, v stacked in one matrix and gate, up in another."""

from __future__ import annotations

from typing import Any

from mindspeed_lora.models.families.config_json import Config, rope_parameters, shape_fields
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.table import DecoderNames


def fields(config: Config) -> dict[str, Any]:
    """Read a Phi-3 config.json; its dropouts of residuals and embedding are Megatron's one where they are equal.

    Its scaling of positions is longrope by whatever name, and the original positions are 4,096 unless the file says
    others beside the scaling: transformers reads it so.
    """
    scaling = rope_parameters(config)
    if scaling.get("type", scaling.get("rope_type")) == "yarn":
        scaling = {**scaling, "type": None, "rope_type": "longrope"}
    config = {"original_max_position_embeddings": 4096, **config, "rope_parameters": scaling}
    residual, embedding = (float(config.get(key) or 0.0) for key in ("resid_pdrop", "embd_pdrop"))
    features = {} if residual == embedding else {"embd_pdrop": embedding}
    return {**shape_fields(config, windowed=True, features=features), "hidden_dropout": residual}


FAMILIES = (
    Family(
        name="phi3",
        model_type="phi3",
        architectures=("Phi3ForCausalLM",),
        aliases=("phi3", "phi-3", "phi3.5", "phi35", "phi4"),
        fields=fields,
        table=DecoderNames(linear_qkv=("self_attn.qkv_proj",), linear_fc1=("mlp.gate_up_proj",)).table(),
    ),
)
