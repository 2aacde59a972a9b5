"""MiniCPM (dense): Llama's tensors; embeddings, what is added to the residual stream, and logits are scaled.

The factors are those of arXiv 2404.06395, section 3: ``scale_emb`` on the embeddings, ``scale_depth / √layers`` on
the outputs of attention and MLP, ``dim_model_base / hidden_size`` on what the output layer reads.
"""

from __future__ import annotations

from typing import Any

from mindspeed_lora.models.families.config_json import Config, required, shape_fields
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.llama import LLAMA_TABLE


def fields(config: Config) -> dict[str, Any]:
    """Read a MiniCPM config.json, whose embeddings are tied where it does not say."""
    factors = {name: float(required(config, name)) for name in ("scale_emb", "scale_depth", "dim_model_base")}
    return shape_fields(config, tied=True, features=factors)


FAMILIES = (
    Family(
        name="minicpm",
        model_type="minicpm",
        architectures=("MiniCPMForCausalLM",),
        aliases=("minicpm",),
        fields=fields,
        table=LLAMA_TABLE,
    ),
)
