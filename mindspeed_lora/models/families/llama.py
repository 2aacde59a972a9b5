"""Llama 2, 3, 3.1 and 3.2, Yi, DeepSeek-LLM, SmolLM2 and the many models of their architecture; the others' base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_lora.models.families.config_json import Config, shape_fields
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.table import DecoderNames

LLAMA_TABLE = DecoderNames().table()


def fields(config: Config, features: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a Llama config.json; ``attention_bias`` covers q, k, v and o, ``mlp_bias`` the whole MLP.

    ``features`` are those of a model that computes more than Llama.
    """
    bias = bool(config.get("attention_bias", False))
    return {
        **shape_fields(config, features=features),
        "add_qkv_bias": bias,
        "add_proj_bias": bias,
        "add_mlp_bias": bool(config.get("mlp_bias", False)),
    }


FAMILIES = (
    Family(
        name="llama",
        model_type="llama",
        architectures=("LlamaForCausalLM",),
        aliases=(
            *(
                "llama",
                "llama2",
                "llama3",
                "llama31",
                "llama3.1",
                "llama32",
                "llama3.2",
                "llama33",
                "llama3.3",
            ),
            *("codellama", "yi", "deepseek", "deepseek-llm", "smollm2"),
        ),
        fields=fields,
        table=LLAMA_TABLE,
    ),
)
