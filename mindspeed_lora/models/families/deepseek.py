"""DeepSeek-V2 (and V2-Lite), DeepSeek-V3 and R1: multi-latent attention, shared experts, experts taken by groups.

Checked against transformers' ``deepseek_v2`` and ``deepseek_v3``. V2 (arXiv 2405.04434, section 2.2.2): softmax scores,
a group ranked by its best expert. V3 (arXiv 2412.19437, equations 12 to 16): sigmoid scores, with a bias for the choice
alone, a group ranked by its two best. The layers behind the last one that predict further tokens
(``num_nextn_predict_layers``) are no part of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_lora.config.shape import MLAShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families.config_json import Config, required, shape_fields
from mindspeed_lora.models.families.experts import STACKED, moe_shape, number_of_experts
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.table import DecoderNames, ExpertNames, LatentNames

_PLAIN = {"attention_bias": (None, False), "mlp_bias": (None, False)}
_OF_V2 = {
    **_PLAIN,
    "scoring_func": (None, "softmax"),
    "topk_method": (None, "greedy", "group_limited_greedy"),
    # With it DeepSeek's own code leaves routed_scaling_factor out, and transformers does not divide.
    "norm_topk_prob": (None, False),
}
_OF_V3 = {**_PLAIN, "scoring_func": (None, "sigmoid"), "topk_method": (None, "noaux_tc")}
"""Keys that change what is computed, with the values of the published models."""


def fields_of_v2(config: Config) -> dict[str, Any]:
    """Read a DeepSeek-V2 config.json; without ``group_limited_greedy`` the groups play no part."""
    _check(config, _OF_V2)
    grouped = config.get("topk_method") == "group_limited_greedy"
    return _fields(
        {"first_k_dense_replace": 0, "n_shared_experts": 2, "num_experts_per_tok": 8, **config},
        rope_interleave=True,
        scaling_factor=float(config.get("routed_scaling_factor", 1.0)),
        normalise=False,
        num_groups=int(config.get("n_group") or 1) if grouped else 1,
        group_topk=int(config.get("topk_group") or 1) if grouped else 1,
        aux_loss_coeff=float(config.get("aux_loss_alpha") or 0.0),
    )


def fields_of_v3(config: Config) -> dict[str, Any]:
    """Read a DeepSeek-V3 config.json."""
    _check(config, _OF_V3)
    return _fields(
        {"first_k_dense_replace": 3, "n_shared_experts": 1, "num_experts_per_tok": 8, **config},
        rope_interleave=bool(config.get("rope_interleave", True)),
        score_function="sigmoid",
        expert_bias=True,
        scaling_factor=float(config.get("routed_scaling_factor", 2.5)),
        normalise=bool(config.get("norm_topk_prob", True)),
        num_groups=int(config.get("n_group") or 1),
        group_topk=int(config.get("topk_group") or 1),
        group_score="top2",
    )


def _check(config: Config, expected: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in expected.items():
        if config.get(key) not in values:
            known = " or ".join(str(value).lower() for value in values if value is not None)
            raise Refused(
                f"config.json: {key} {str(config[key]).lower()} is not supported; expected {known}."
            )


def _fields(config: Config, rope_interleave: bool, **routing: Any) -> dict[str, Any]:
    mla = MLAShape(
        q_lora_rank=None if config.get("q_lora_rank", 1536) is None else int(config.get("q_lora_rank", 1536)),
        kv_lora_rank=int(required(config, "kv_lora_rank")),
        qk_head_dim=int(required(config, "qk_nope_head_dim")),
        qk_pos_emb_head_dim=int(required(config, "qk_rope_head_dim")),
        v_head_dim=int(required(config, "v_head_dim")),
        rope_interleave=rope_interleave,
    )
    heads = int(required(config, "num_attention_heads"))
    # What a head is wide, and that each has a key of its own, follows from the latent attention.
    of_heads = {"head_dim": mla.head_size, "num_key_value_heads": heads}
    dense = _dense_layers(config)
    experts = (
        None if len(dense) == int(required(config, "num_hidden_layers")) else _experts(config, dense, routing)
    )
    return {**shape_fields({**config, **of_heads}), "mla": mla, "moe": experts}


def _dense_layers(config: Config) -> tuple[int, ...]:
    """The first layers, and those between every ``moe_layer_freq``-th."""
    first, every = int(config["first_k_dense_replace"]), int(config.get("moe_layer_freq") or 1)
    layers = range(int(required(config, "num_hidden_layers")))
    return tuple(layer for layer in layers if layer < first or layer % every)


def _experts(config: Config, dense: tuple[int, ...], routing: Mapping[str, Any]) -> Any:
    width = int(required(config, "moe_intermediate_size"))
    return moe_shape(
        config,
        num_experts=number_of_experts(config, "n_routed_experts"),
        width_key="moe_intermediate_size",
        topk=8,
        dense_layers=dense,
        shared_ffn_hidden_size=width * int(config["n_shared_experts"] or 0),
        **routing,
    )


FAMILIES = (
    Family(
        name="deepseek_v2",
        model_type="deepseek_v2",
        architectures=("DeepseekV2ForCausalLM",),
        aliases=("deepseek2", "deepseek2-lite", "deepseek25", "deepseek_v2"),
        fields=fields_of_v2,
        table=DecoderNames(latent=LatentNames(), experts=ExpertNames(shared="mlp.shared_experts")).table(),
        also_stored_as=STACKED,
    ),
    Family(
        name="deepseek_v3",
        model_type="deepseek_v3",
        architectures=("DeepseekV3ForCausalLM",),
        aliases=("deepseek3", "deepseek_v3"),
        fields=fields_of_v3,
        table=DecoderNames(
            latent=LatentNames(),
            experts=ExpertNames(expert_bias="mlp.gate.e_score_correction_bias", shared="mlp.shared_experts"),
        ).table(),
        also_stored_as=STACKED,
    ),
)
