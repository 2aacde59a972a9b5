"""Granite 3 (dense): Llama's tensors with factors on embeddings, residuals, attention scores and logits.

They are MiniCPM's features (:mod:`mindspeed_lora.models.families.minicpm`) and Gemma 2's divisor of the scores, by
other numbers.
"""

from __future__ import annotations

import math
from typing import Any

from mindspeed_lora.models.families import llama
from mindspeed_lora.models.families.config_json import Config, attention_sizes, required
from mindspeed_lora.models.families.family import Family


def fields(config: Config) -> dict[str, Any]:
    """Read a Granite config.json; a factor that is 1 is no feature."""
    of_embedding, of_residual, of_scores, of_logits = (
        float(config.get(name) or 1.0)
        for name in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    )
    width, layers = float(required(config, "hidden_size")), int(required(config, "num_hidden_layers"))
    usual = attention_sizes(config, None, None)["kv_channels"] ** -0.5
    told = {
        "query_pre_attn_scalar": None if math.isclose(of_scores, usual) else of_scores**-2,
        "scale_emb": None if of_embedding == 1.0 else of_embedding,
        "scale_depth": None if of_residual == 1.0 else of_residual * math.sqrt(layers),
        "dim_model_base": None if of_logits == 1.0 else width / of_logits,
    }
    return llama.fields(config, told)


FAMILIES = (
    Family(
        name="granite",
        model_type="granite",
        architectures=("GraniteForCausalLM",),
        aliases=("granite",),
        fields=fields,
        table=llama.LLAMA_TABLE,
    ),
)
