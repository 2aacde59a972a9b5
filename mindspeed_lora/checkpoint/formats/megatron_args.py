"""The ``args`` namespace of Megatron checkpoints, in Megatron-LM's and MindSpeed-LLM's names, both ways."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.checkpoint.formats.mcore_experts import SEQUENTIAL, ExpertRanks
from mindspeed_lora.checkpoint.formats.megatron_moe_args import (
    expert_args,
    latent_args,
    mla_from_args,
    moe_from_args,
    with_known_routing,
)
from mindspeed_lora.checkpoint.formats.megatron_rope_args import rope_args, rope_from_args
from mindspeed_lora.config.model_features import features_of
from mindspeed_lora.config.shape import ModelShape, MoEShape
from mindspeed_lora.config.stages import LayerPlacement
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES

_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "normalization": (None, "RMSNorm"),
    "position_embedding_type": (None, "rope", "alibi"),
}
"""Attributes that change the tensors, with the values that are known here."""

_UNTOLD = {
    "norm_epsilon": "norm_epsilon",
    "rotary_base": "rotary_base",
    "rope_scaling": "rope_scaling_type",
    "sliding_window": "sliding_window",
}
"""Fields of the shape that no tensor shows, with the attribute of ``args`` that tells them."""

_BY_SWITCHES = ("llama", "mistral", "qwen2", "qwen3")
"""Families that people's scripts call by each other's names: their switches tell which one it is."""

_REQUIRED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings")


def args_from_shape(
    shape: ModelShape,
    tp_size: int,
    placement: LayerPlacement,
    padded_vocab_size: int,
    iteration: int = 1,
    experts: ExpertRanks | None = None,
    form: str = SEQUENTIAL,
) -> argparse.Namespace:
    """The namespace that goes into every rank's file of a checkpoint of this layout; experts lie in it as ``form``."""
    experts = experts or ExpertRanks(tp_size=tp_size, etp_size=tp_size)
    dtype = getattr(torch, shape.params_dtype)
    values = {
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "group_query_attention": shape.num_query_groups != shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "seq_length": shape.max_position_embeddings,
        "max_position_embeddings": shape.max_position_embeddings,
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "rotary_base": shape.rotary_base,
        "rotary_percent": shape.rotary_percent,
        "normalization": "RMSNorm",
        "norm_epsilon": shape.norm_epsilon,
        "swiglu": not {"geglu", "gelu_tanh"} & {name for name, _ in shape.features},
        "add_bias_linear": shape.add_mlp_bias,
        "add_qkv_bias": shape.add_qkv_bias,
        "add_dense_bias": shape.add_proj_bias,
        "qk_layernorm": shape.qk_layernorm,
        "post_norm": shape.post_norm,
        "untie_embeddings_and_output_weights": shape.untie_embeddings_and_output_weights,
        "vocab_size": shape.vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "make_vocab_size_divisible_by": 1,
        "hidden_dropout": shape.hidden_dropout,
        "attention_dropout": shape.attention_dropout,
        "sliding_window": shape.sliding_window,
        "model_type_hf": shape.family,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "tensor_model_parallel_size": tp_size,
        "use_mcore_models": True,
        "transformer_impl": "local",
        "iteration": iteration,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        **_placement_args(placement),
        **rope_args(shape.rope_scaling),
        **expert_args(shape, placement, experts, form),
        **latent_args(shape.mla),
        **dict(shape.features),
    }
    return argparse.Namespace(**values)


def _placement_args(placement: LayerPlacement) -> dict[str, Any]:
    """Layers and stages; Megatron and MindSpeed-LLM count the no-op layers among the layers."""
    vp, sizes = placement.vp_size, [len(chunk) for chunk in placement.chunks]
    return {
        "num_layers": placement.num_slots,
        "noop_layers": list(placement.noop_slots) or None,
        "pipeline_model_parallel_size": placement.pp_size,
        "virtual_pipeline_model_parallel_size": vp if vp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": sizes[0] if vp > 1 and placement.is_even else None,
        "num_layer_list": ",".join(map(str, sizes)) if vp == 1 and not placement.is_even else None,
    }


def with_untold(shape: ModelShape, args: argparse.Namespace, known: ModelShape) -> ModelShape:
    """The shape from ``args``, completed by a known one where ``args`` is silent and no tensor shows it."""
    silent = [field for field, name in _UNTOLD.items() if getattr(args, name, None) is None]
    told = with_known_routing(shape, known)
    return dataclasses.replace(told, **{field: getattr(known, field) for field in silent})


def shape_from_args(args: argparse.Namespace, local_names: Collection[str], path: Path) -> ModelShape:
    """The architecture that a checkpoint's ``args`` and its parameter names tell; ``path`` is for messages.

    Biases and norms are what the parameters have. A vocabulary that is only known with its padding is taken
    with it.
    """
    values = vars(args)
    for name, supported in _UNSUPPORTED.items():
        if values.get(name) not in supported:
            raise Refused(f"{path}: args.{name} is {values[name]!r}, which is not supported.")
    if not (values.get("swiglu", True) or values.get("geglu") or values.get("gelu_tanh")):
        raise Refused(f"{path}: args.swiglu is {values['swiglu']!r}, which is not supported.")
    missing = [name for name in _REQUIRED if not values.get(name)]
    if missing:
        raise Refused(f"{path}: args lacks {', '.join(missing)}.")
    _check_kinds(values, path)
    heads = values["num_attention_heads"]
    grouped = values.get("group_query_attention", False)
    vocabulary = values.get("true_vocab_size") or values.get("vocab_size") or values.get("padded_vocab_size")
    if not vocabulary:
        raise Refused(f"{path}: args lacks vocab_size and padded_vocab_size.")
    present = _present(local_names)
    moe, mla = moe_from_args(values, local_names, path), mla_from_args(values, path)
    width = values.get("kv_channels") or values["hidden_size"] // heads
    if mla is not None:
        width, grouped = mla.head_size, False
    return ModelShape(
        family=_family(values, present, moe),
        num_layers=values["num_layers"] - _num_noops(values.get("noop_layers")),
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["ffn_hidden_size"],
        num_attention_heads=heads,
        num_query_groups=(values.get("num_query_groups") or heads) if grouped else heads,
        kv_channels=width,
        vocab_size=vocabulary,
        max_position_embeddings=values["max_position_embeddings"],
        norm_epsilon=values.get("norm_epsilon") or 1e-5,
        rotary_base=float(values.get("rotary_base") or 10000.0),
        rotary_percent=float(values.get("rotary_percent") or 1.0),
        rope_scaling=rope_from_args(values),
        untie_embeddings_and_output_weights=bool(
            values.get("untie_embeddings_and_output_weights", "output_layer.weight" in local_names)
        ),
        sliding_window=values.get("sliding_window"),
        hidden_dropout=float(values.get("hidden_dropout") or 0.0),
        attention_dropout=float(values.get("attention_dropout") or 0.0),
        add_qkv_bias=present["add_qkv_bias"],
        add_proj_bias=present["add_proj_bias"],
        add_mlp_bias=present["add_mlp_bias"],
        qk_layernorm=present["qk_layernorm"] and mla is None,
        post_norm=present["post_norm"],
        moe=moe,
        mla=mla,
        features=_features(values, width),
    )


def _check_kinds(values: dict[str, Any], path: Path) -> None:
    """Refuse numbers that are none; a file from elsewhere can hold anything."""
    for name in (
        *_REQUIRED,
        "num_query_groups",
        "kv_channels",
        "vocab_size",
        "padded_vocab_size",
        "true_vocab_size",
    ):
        value = values.get(name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is not None and not whole:
            raise Refused(f"{path}: args.{name} is {value!r}; expected a positive whole number.")
    for name in ("norm_epsilon", "rotary_base", "rope_scaling_factor", "hidden_dropout", "attention_dropout"):
        value = values.get(name)
        if value is not None and not isinstance(value, (int, float)):
            raise Refused(f"{path}: args.{name} is {value!r}; expected a number.")


def switched_names(args: argparse.Namespace) -> list[str]:
    """Names of parameters that the switches of ``args`` mean, for a file that holds none of the base's."""
    switches = {
        "add_qkv_bias": "linear_qkv.bias",
        "add_dense_bias": "linear_proj.bias",
        "add_bias_linear": "linear_fc1.bias",
        "qk_layernorm": "q_layernorm.weight",
        "untie_embeddings_and_output_weights": "output_layer.weight",
    }
    return [name for switch, name in switches.items() if getattr(args, switch, None)]


def _features(values: dict[str, Any], head_width: int) -> tuple[tuple[str, Any], ...]:
    """What these arguments ask for beyond Llama's computation; the usual divisor of attention scores is not beyond.

    Gemma has GELU's tanh form alone, by whichever name.
    """
    if str(values.get("model_type_hf")).startswith("gemma") and values.get("geglu"):
        values = {**values, "geglu": None, "gelu_tanh": True}
    if values.get("use_glm_rope"):
        values = {**values, "rotary_interleaved": True}
    return tuple(pair for pair in features_of(values) if pair != ("query_pre_attn_scalar", head_width))


def _num_noops(noop_layers: str | Collection[int] | None) -> int:
    """How many of the layers are no-ops; MindSpeed-LLM keeps their places as text or as a set."""
    places = noop_layers.split(",") if isinstance(noop_layers, str) else noop_layers
    return len(places or ())


def _present(local_names: Collection[str]) -> dict[str, bool]:
    """The switches that the names of the parameters tell."""

    def has(ending: str) -> bool:
        return any(name.endswith(ending) for name in local_names)

    return {
        "add_qkv_bias": has("linear_qkv.bias"),
        "add_proj_bias": has("linear_proj.bias"),
        "add_mlp_bias": has("linear_fc1.bias"),
        "qk_layernorm": has("q_layernorm.weight"),
        "post_norm": has("post_attn_norm.weight"),
    }


def _family(values: dict[str, Any], present: dict[str, bool], moe: MoEShape | None) -> str:
    """The family whose Hugging Face form has these switches; ``model_type_hf`` decides where several do."""
    told = values.get("model_type_hf")
    named = next((one.name for one in FAMILIES.values() if told == one.name), None)
    named = named or next((one.name for one in FAMILIES.values() if told in one.aliases), None)
    if named is not None and named not in _BY_SWITCHES:
        return named
    if values.get("multi_latent_attention") or values.get("multi_head_latent_attention"):
        return "deepseek_v3" if moe is not None and moe.expert_bias else "deepseek_v2"
    if moe is not None:
        return _family_of_experts(present, moe)
    if present["post_norm"]:
        if not values.get("add_rmsnorm_offset"):
            return "glm4"
        return "gemma3_text" if present["qk_layernorm"] else "gemma2"
    if present["qk_layernorm"]:
        return "qwen3"
    if present["add_qkv_bias"] and not present["add_proj_bias"]:
        return "qwen2"
    if named in ("llama", "mistral"):
        return named
    return "mistral" if values.get("sliding_window") else "llama"


def _family_of_experts(present: dict[str, bool], moe: MoEShape) -> str:
    """The family with grouped queries whose experts have these parts."""
    if moe.expert_bias:
        return "glm4_moe"
    if moe.shared_expert_gate:
        return "qwen2_moe"
    return "qwen3_moe" if present["qk_layernorm"] else "mixtral"
