"""Experts and latent attention in the ``args`` of Megatron checkpoints, both ways.

The names are Megatron-LM's; beside them MindSpeed-LLM's, where it tells the same by another one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mindspeed_lora.checkpoint.formats.mcore_experts import ExpertRanks
from mindspeed_lora.config.shape import MLAShape, ModelShape, MoEShape
from mindspeed_lora.config.stages import LayerPlacement
from mindspeed_lora.errors import Refused

_UNNORMALISED = ("softmax_topk", "group_limited_greedy", "pai_megatron_aux_loss")
"""MindSpeed-LLM's ways of routing that leave a softmax over all experts as it is, without ``norm_topk_prob``."""

_ROUTING = (
    *("normalise", "score_function", "scaling_factor", "num_groups", "group_topk", "group_score"),
    "aux_loss_coeff",
)
"""Fields of the experts' shape that no tensor shows."""


def expert_args(
    shape: ModelShape, placement: LayerPlacement, experts: ExpertRanks, form: str
) -> dict[str, Any]:
    """The arguments that tell the experts of a model and how files hold them."""
    values: dict[str, Any] = {
        "expert_model_parallel_size": experts.ep_size,
        "expert_tensor_parallel_size": experts.etp_size,
    }
    moe = shape.moe
    if moe is None:
        return {"num_experts": None, **values}
    slots = [layer for chunk in placement.chunks for layer in chunk]
    pattern = [0 if layer is not None and moe.is_dense(layer) else 1 for layer in slots]
    first = pattern.index(1) if 1 in pattern else len(pattern)
    return {
        **values,
        "num_experts": moe.num_experts,
        "moe_router_topk": moe.topk,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_layer_freq": pattern if 0 in pattern else 1,
        "first_k_dense_replace": first if all(pattern[first:]) and first else None,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": moe.shared_expert_gate,
        "shared_expert_gate": moe.shared_expert_gate,
        "moe_router_score_function": moe.score_function,
        "moe_router_pre_softmax": moe.score_function == "softmax" and not moe.normalise,
        "norm_topk_prob": moe.normalise,
        "moe_router_topk_scaling_factor": moe.scaling_factor if moe.scaling_factor != 1.0 else None,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_num_groups": moe.num_groups if moe.num_groups > 1 else None,
        "moe_router_group_topk": moe.group_topk if moe.num_groups > 1 else None,
        "moe_router_group_score": moe.group_score,
        "moe_aux_loss_coeff": moe.aux_loss_coeff,
        "moe_grouped_gemm": form != "sequential",
        "moe_tp_extend_ep": experts.extended,
    }


def moe_from_args(values: Mapping[str, Any], local_names: Collection[str], path: Path) -> MoEShape | None:
    """The experts that ``args`` tell; gates, biases and shared experts are those that the parameters have."""
    count = _number(values, path, "num_experts", "num_moe_experts")
    if not count:
        return None
    topk = _number(values, path, "moe_router_topk") or 2
    width = _number(values, path, "moe_ffn_hidden_size", "moe_intermediate_size") or values["ffn_hidden_size"]
    score = values.get("moe_router_score_function") or "softmax"
    if score not in ("softmax", "sigmoid"):
        raise Refused(f"{path}: args.moe_router_score_function is {score!r}; expected softmax or sigmoid.")
    if topk > count:
        raise Refused(f"{path}: args.moe_router_topk is {topk} of {count} experts.")
    groups = _number(values, path, "moe_router_num_groups", "n_group") or 1
    shared = _number(values, path, "moe_shared_expert_intermediate_size")
    if not shared:
        shared = width * (_number(values, path, "n_shared_experts") or 0)
    scaling = values.get("moe_router_topk_scaling_factor") or values.get("routed_scaling_factor") or 1.0
    return MoEShape(
        num_experts=count,
        topk=topk,
        ffn_hidden_size=width,
        dense_layers=_dense_layers(values, path),
        shared_ffn_hidden_size=shared,
        shared_expert_gate=_has(local_names, "shared_experts.gate_weight"),
        score_function=score,
        normalise=_normalises(values, score),
        scaling_factor=float(scaling),
        expert_bias=_has(local_names, "router.expert_bias"),
        num_groups=groups,
        group_topk=(_number(values, path, "moe_router_group_topk", "topk_group") or 1) if groups > 1 else 1,
        group_score=values.get("moe_router_group_score") or ("top2" if score == "sigmoid" else "max"),
        aux_loss_coeff=_coefficient(values.get("moe_aux_loss_coeff")),
    )


def with_known_routing(shape: ModelShape, known: ModelShape) -> ModelShape:
    """The shape with the routing of a known one: arguments of other programs tell it by other words.

    So does the width of an ordinary MLP where no layer has one.
    """
    if shape.moe is None or known.moe is None:
        return shape
    moe = dataclasses.replace(shape.moe, **{name: getattr(known.moe, name) for name in _ROUTING})
    has_dense = bool(moe.dense_layers or known.moe.dense_layers)
    width = shape.ffn_hidden_size if has_dense else known.ffn_hidden_size
    return dataclasses.replace(shape, moe=moe, ffn_hidden_size=width)


def _coefficient(value: Any) -> float:
    """The weight of the load-balancing loss; newer Megatron-LM has one for each of several such losses."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return float(first) if isinstance(first, (int, float)) else 0.0


def _normalises(values: Mapping[str, Any], score: str) -> bool:
    """Whether a token's weights are divided by their sum, as Megatron-LM does unless it takes the softmax first."""
    told = values.get("norm_topk_prob")
    if told or score == "sigmoid":
        return told is not False
    routing = values.get("moe_router_load_balancing_type")
    return not (values.get("moe_router_pre_softmax") or routing in _UNNORMALISED)


def _dense_layers(values: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    """Numbers of the layers without experts; ``args`` count the no-op layers too, which have no number."""
    slots, freq = values["num_layers"], values.get("moe_layer_freq")
    first = values.get("first_k_dense_replace")
    if isinstance(freq, (list, tuple)):
        if len(freq) != slots:
            raise Refused(f"{path}: args.moe_layer_freq has {len(freq)} entries for {slots} layers.")
        pattern = [bool(entry) for entry in freq]
    else:
        step = freq if isinstance(freq, int) and freq > 0 else 1
        pattern = [slot % step == 0 for slot in range(slots)]
    noops = _places(values.get("noop_layers"))
    layers = [has for slot, has in enumerate(pattern) if slot not in noops]
    dense = first if isinstance(first, int) else 0
    return tuple(layer for layer, has in enumerate(layers) if not has or layer < dense)


def _places(noop_layers: str | Collection[int] | None) -> set[int]:
    entries: Sequence[Any] = (
        noop_layers.split(",") if isinstance(noop_layers, str) else list(noop_layers or ())
    )
    return {int(entry) for entry in entries}


def _has(local_names: Collection[str], ending: str) -> bool:
    return any(name.endswith(ending) for name in local_names)


def _number(values: Mapping[str, Any], path: Path, *names: str) -> int | None:
    """The first of some arguments that is given, which must be a whole number."""
    for name in names:
        value = values.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise Refused(f"{path}: args.{name} is {value!r}; expected a whole number.")
        return value
    return None


_MLA = {
    "q_lora_rank": ("q_lora_rank",),
    "kv_lora_rank": ("kv_lora_rank",),
    "qk_head_dim": ("qk_nope_head_dim", "qk_head_dim"),
    "qk_pos_emb_head_dim": ("qk_rope_head_dim", "qk_pos_emb_head_dim"),
    "v_head_dim": ("v_head_dim",),
}
"""Fields of latent attention, and the arguments that tell them."""


def latent_args(mla: MLAShape | None) -> dict[str, Any]:
    """The arguments that tell latent attention."""
    if mla is None:
        return {"multi_latent_attention": False}
    return {"multi_latent_attention": True, **dataclasses.asdict(mla)}


def mla_from_args(values: Mapping[str, Any], path: Path) -> MLAShape | None:
    """Latent attention as ``args`` tell it."""
    if not (values.get("multi_latent_attention") or values.get("multi_head_latent_attention")):
        return None
    found = {field: _number(values, path, *names) for field, names in _MLA.items()}
    missing = [field for field, value in found.items() if not value and field != "q_lora_rank"]
    if missing:
        raise Refused(f"{path}: args lacks {', '.join(missing)} of multi-latent attention.")
    switches = {
        field.name: values[field.name]
        for field in dataclasses.fields(MLAShape)
        if field.name not in _MLA and values.get(field.name) is not None
    }
    sizes: dict[str, Any] = {**found, "q_lora_rank": found["q_lora_rank"] or None}
    return MLAShape(**sizes, **switches)
