"""Baichuan and Baichuan 2: Llama's tensors, with q, k and v stacked in ``W_pack``.

The 7B models have rotary positions; the 13B ones ALiBi, and no ``max_position_embeddings`` in their config.json.
Baichuan 2 normalises the rows of its output layer before every product.
"""

from __future__ import annotations

from typing import Any

from mindspeed_lora.models.families.config_json import Config, shape_fields
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.table import DecoderNames

_FIRST_7B = "BaiChuanForCausalLM"
_VOCABULARY_OF_2 = 125696


def fields(config: Config) -> dict[str, Any]:
    """Read a Baichuan config.json."""
    alibi = config.get("max_position_embeddings") is None
    # Of the first 13B's config.json, that of Baichuan 2 differs in these.
    is_second = "z_loss_weight" in config or config.get("vocab_size") == _VOCABULARY_OF_2
    norm_head = _FIRST_7B not in (config.get("architectures") or ()) and (is_second or not alibi)
    if alibi:
        config = {**config, "max_position_embeddings": config.get("model_max_length")}
    features = {"position_embedding_type": "alibi" if alibi else None, "norm_head": norm_head}
    return shape_fields(config, features=features)


FAMILIES = (
    Family(
        name="baichuan",
        model_type="baichuan",
        architectures=("BaichuanForCausalLM", _FIRST_7B),
        aliases=("baichuan", "baichuan2"),
        fields=fields,
        table=DecoderNames(linear_qkv=("self_attn.W_pack",)).table(),
    ),
)
