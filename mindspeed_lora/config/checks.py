"""Flags against the model's resolved shape, once that is known."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mindspeed_lora.config.model import ModelConfig
from mindspeed_lora.config.model_features import features_of, refuse_unbuilt
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.rotary_flags import (
    LONGROPE,
    check_rotary,
    differing_rotary,
    rope_scaling_from_flags,
    same_value,
)
from mindspeed_lora.config.shape import MLAShape, ModelShape
from mindspeed_lora.config.stages import LayerPlacement, divisors
from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.errors import Refused

_COMPARED = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_query_groups",
    "kv_channels": "kv_channels",
    "rotary_base": "rotary_base",
    "rotary_percent": "rotary_percent",
    "sliding_window_size": "sliding_window",
    "norm_epsilon": "norm_epsilon",
    "add_qkv_bias": "add_qkv_bias",
    "add_dense_bias": "add_proj_bias",
    "post_norm": "post_norm",
    "qk_layernorm": "qk_layernorm",
    "untie_embeddings_and_output_weights": "untie_embeddings_and_output_weights",
    "vocab_size": "vocab_size",
}
"""Field of the flags → field of the shape, for what must be equal when the flag is given."""

_MLA_COMPARED = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
_FEATURES_COMPARED = (
    *(
        "rotary_interleaved",
        "interleave_sliding_window",
        "attn_logit_softcapping",
        "output_logit_softcapping",
    ),
    *("input_embeds_norm", "scale_emb", "scale_depth", "dim_model_base", "geglu", "gelu_tanh"),
)
"""Flags that say a feature of the shape by its name."""
_OTHERWISE_IN_MLA = ("kv_channels", "qk_layernorm")
"""With multi-latent attention these say nothing: its widths are its own, and its latent vectors have norms anyway."""


def check_layout(shape: ModelShape, parallel: ParallelConfig) -> LayerPlacement:
    """Refuse a model that is not built, and degrees that do not divide what they cut; returns where the layers go."""
    refuse_unbuilt(shape)
    check_rotary(shape)
    check_experts(shape, parallel)
    tp = parallel.tensor_model_parallel_size
    cut = {
        "attention heads": shape.num_attention_heads,
        "query groups (key/value heads)": shape.num_query_groups,
        **mlp_columns(shape),
    }
    for what, size in cut.items():
        if size % tp:
            raise Refused(
                f"--tensor-model-parallel-size {tp} does not divide the model's {size} {what}; "
                f"use {divisors(math.gcd(*cut.values()))}"
            )
    return LayerPlacement.of(shape.num_layers, parallel)


def mlp_columns(shape: ModelShape) -> dict[str, int]:
    """Inner widths of what TP cuts beside attention, by what they are."""
    columns = {}
    if shape.moe is None or shape.moe.dense_layers:
        columns["columns of the MLP (ffn_hidden_size)"] = shape.ffn_hidden_size
    if shape.moe is not None and shape.moe.shared_ffn_hidden_size:
        columns["columns of the shared experts"] = shape.moe.shared_ffn_hidden_size
    return columns


def check_experts(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Refuse degrees of expert parallelism that do not divide what they cut."""
    ep, etp = parallel.expert_parallel_size, parallel.expert_tensor_size
    named = f"--expert-model-parallel-size {parallel.expert_model_parallel_size}"
    if parallel.moe_tp_extend_ep:
        named += (
            f" x --tensor-model-parallel-size {parallel.tensor_model_parallel_size} of --moe-tp-extend-ep"
        )
    if shape.moe is None:
        if ep > 1:
            raise Refused(f"{named}: the model ({shape.family}) has no experts; leave it out")
        return
    if shape.moe.num_experts % ep:
        raise Refused(
            f"{named} does not divide the model's {shape.moe.num_experts} experts; "
            f"use {divisors(shape.moe.num_experts)}"
        )
    if shape.moe.ffn_hidden_size % etp:
        raise Refused(
            f"--expert-tensor-parallel-size {etp} does not divide the {shape.moe.ffn_hidden_size} columns of an "
            f"expert; use {divisors(shape.moe.ffn_hidden_size)}"
        )


def check_expert_files(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Refuse to save the model itself in a layout for which Megatron's rank files have no names."""
    tp, etp = parallel.tensor_model_parallel_size, parallel.expert_tensor_size
    if shape.moe is not None and tp % etp:
        raise Refused(
            f"--expert-tensor-parallel-size {etp} does not divide --tensor-model-parallel-size {tp}: ranks with "
            "different parts of an expert would have one file name, so the model cannot be saved; use "
            f"{divisors(tp)}, or save the adapter alone"
        )


def check_recompute(placement: LayerPlacement, training: TrainingConfig) -> None:
    """Refuse groups of layers to recompute that do not divide the layers of a stage: megatron-core needs that."""
    group = training.recompute_num_layers or 1
    uniform = training.recompute_granularity == "full" and training.recompute_method in (None, "uniform")
    sizes = {len(chunk) for chunk in placement.chunks}
    for layers in sorted(sizes, reverse=True):
        if uniform and layers % group:
            stage = "virtual pipeline stage" if placement.vp_size > 1 else "pipeline stage"
            raise Refused(
                f"--recompute-num-layers {group} does not divide the {layers} layers of a {stage}, which "
                f"--recompute-method uniform needs; use {divisors(math.gcd(*sizes))}"
            )


def check_interleaving(placement: LayerPlacement, training: TrainingConfig, dp_size: int) -> None:
    """Refuse a number of micro-batches that the interleaved schedule does not take: it wants whole rounds."""
    if placement.vp_size == 1:
        return
    pp, rows = placement.pp_size, training.micro_batch_size * dp_size
    batch = training.global_batch_size
    if (batch // rows) % pp:
        nearest = max(1, math.floor(batch / (rows * pp) + 0.5)) * rows * pp
        raise Refused(
            f"--global-batch-size {batch} gives {batch // rows} micro-batches a step, and the interleaved pipeline "
            f"needs a multiple of --pipeline-model-parallel-size {pp}; the nearest valid one is {nearest}"
        )


def reconcile(model: ModelConfig, shape: ModelShape, num_noops: int = 0) -> ModelShape:
    """The checkpoint's shape with the dropout that the flags ask for; contradicting flags are refused.

    ``--num-layers`` counts the no-op layers too.

    ``--max-position-embeddings``, ``--init-method-std`` and switches that choose kernels never contradict.
    ``--padded-vocab-size`` may be anything from the model's own vocabulary up.
    """
    told = dataclasses.replace(shape, num_layers=shape.num_layers + num_noops)
    pairs = [(flag, getattr(model, flag), getattr(told, name)) for flag, name in _COMPARED.items()]
    pairs += [(flag, getattr(model, flag), getattr(shape.mla, flag, None)) for flag in _MLA_COMPARED]
    pairs.append(("multi_latent_attention", model.multi_latent_attention, shape.mla is not None))
    if shape.mla is not None:
        pairs = [pair for pair in pairs if pair[0] not in _OTHERWISE_IN_MLA]
    differing = [
        (flag, given, found)
        for flag, given, found in pairs
        if given is not None and not same_value(given, found)
    ]
    differing += differing_rotary(model, shape)
    differing += _differing_features(model, shape)
    if model.add_rmsnorm_offset and not _counts_from_1(shape):
        differing.append(("add_rmsnorm_offset", True, False))
    if model.disable_bias_linear and (shape.add_proj_bias or shape.add_mlp_bias):
        differing.append(("disable_bias_linear", True, "with bias"))
    if model.padded_vocab_size is not None and model.padded_vocab_size < shape.vocab_size:
        differing.append(("padded_vocab_size", model.padded_vocab_size, f"{shape.vocab_size} words"))
    if differing:
        listed = ", ".join(_contradiction(*entry) for entry in differing)
        listed += f" with the {num_noops} of --noop-layers" if num_noops and "--num-layers" in listed else ""
        raise Refused(f"contradicting the checkpoint: {listed}; leave out what the checkpoint tells")
    given = {
        name: getattr(model, name)
        for name in ("hidden_dropout", "attention_dropout")
        if getattr(model, name) is not None
    }
    return dataclasses.replace(shape, **given)


def _differing_features(model: ModelConfig, shape: ModelShape) -> list[tuple[str, Any, Any]]:
    """Flag, its value and the shape's, where they are not the same."""
    pairs = [(flag, getattr(model, flag), shape.feature(flag)) for flag in _FEATURES_COMPARED]
    divisor = shape.feature("query_pre_attn_scalar") or shape.kv_channels
    pairs.append(("query_pre_attn_scalar", model.query_pre_attn_scalar, divisor))
    if model.swiglu and (shape.feature("geglu") or shape.feature("gelu_tanh")):
        pairs.append(("swiglu", True, False))
    return [(flag, given, found) for flag, given, found in pairs if given and not same_value(given, found)]


def _counts_from_1(shape: ModelShape) -> bool:
    return any(name in ("add_rmsnorm_offset", "apply_layernorm_1p") for name, _ in shape.features)


def _contradiction(field: str, given: Any, found: Any) -> str:
    name = "--" + field.replace("_", "-")
    words = {None: "none", False: "off", True: "on"}
    told = words.get(found, found) if found is None or isinstance(found, bool) else found
    return f"{name} (checkpoint: {told})" if given is True else f"{name} {given} (checkpoint: {told})"


def _least_shape(model: ModelConfig, vocab_size: int | None = None) -> dict[str, int | None]:
    """What a model's shape needs at least, by flag; ``vocab_size`` where no flag tells it."""
    return {
        "--num-layers": model.num_layers,
        "--hidden-size": model.hidden_size,
        "--num-attention-heads": model.num_attention_heads,
        "--max-position-embeddings": model.max_position_embeddings,
        "--vocab-size": model.vocab_size or model.padded_vocab_size or vocab_size,
    }


def missing_shape_flags(model: ModelConfig, vocab_size: int | None = None) -> list[str]:
    """The flags without which there is no shape; ``vocab_size`` where none tells the vocabulary."""
    return [name for name, value in _least_shape(model, vocab_size).items() if value is None]


def shape_from_flags(model: ModelConfig, num_noops: int = 0) -> ModelShape:
    """The shape of a model with random weights, from the flags alone, with Megatron's defaults.

    ``--num-layers`` counts the no-op layers too.
    """
    missing = missing_shape_flags(model)
    if missing:
        raise Refused(f"without --load the shape must be given: {', '.join(missing)} missing")
    needed = _least_shape(model).values()
    layers, hidden, heads, positions, vocabulary = (value for value in needed if value is not None)
    mla = _mla(model)
    if layers <= num_noops:
        raise Refused(f"--num-layers {layers}: --noop-layers leaves none of them; raise it")
    return ModelShape(
        family=_family(model),
        num_layers=layers - num_noops,
        hidden_size=hidden,
        ffn_hidden_size=model.ffn_hidden_size or _default_ffn(hidden, bool(model.swiglu)),
        num_attention_heads=heads,
        num_query_groups=_query_groups(model, heads) if mla is None else heads,
        kv_channels=_head_width(model, hidden, heads) if mla is None else mla.head_size,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        norm_epsilon=model.norm_epsilon or 1e-5,
        rotary_base=model.rotary_base or 10000.0,
        rotary_percent=model.rotary_percent or 1.0,
        rope_scaling=rope_scaling_from_flags(model, positions),
        untie_embeddings_and_output_weights=bool(model.untie_embeddings_and_output_weights),
        add_qkv_bias=bool(model.add_qkv_bias),
        add_proj_bias=bool(model.add_dense_bias),
        post_norm=bool(model.post_norm),
        qk_layernorm=bool(model.qk_layernorm) and mla is None,
        mla=mla,
        sliding_window=model.sliding_window_size,
        hidden_dropout=model.hidden_dropout or 0.0,
        attention_dropout=model.attention_dropout or 0.0,
        features=_features(model),
    )


def _family(model: ModelConfig) -> str:
    """The family whose Hugging Face form has the switches that are on."""
    if model.multi_latent_attention:
        return "deepseek_v3"
    if model.gelu_tanh and model.add_rmsnorm_offset:
        return "gemma2" if model.post_norm else "gemma"
    if model.rotary_interleaved:
        return "glm4" if model.post_norm else "glm"
    if model.scale_emb is not None:
        return "minicpm"
    if model.rope_scaling_type == LONGROPE:
        return "phi3"
    if model.qk_layernorm:
        return "qwen3"
    if model.add_qkv_bias:
        return "qwen2"
    return "mistral" if model.sliding_window_size is not None else "llama"


def _features(model: ModelConfig) -> tuple[tuple[str, Any], ...]:
    """What the flags ask for otherwise than Llama's computation."""
    names = (*_FEATURES_COMPARED, "query_pre_attn_scalar", "add_rmsnorm_offset")
    return features_of({name: getattr(model, name) for name in names})


def _default_ffn(hidden_size: int, swiglu: bool) -> int:
    """Megatron's width of the MLP: 4 h, or with a gate two thirds of it in multiples of 64."""
    return int(4 * hidden_size * 2 / 3) // 64 * 64 if swiglu else 4 * hidden_size


def _mla(model: ModelConfig) -> MLAShape | None:
    """Multi-latent attention, with megatron-core's widths; queries have a latent vector where its width is given."""
    given = {name: getattr(model, name) for name in _MLA_COMPARED if getattr(model, name) is not None}
    if model.multi_latent_attention:
        widths = {"kv_lora_rank": 512, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128}
        return MLAShape(**{"q_lora_rank": None, **widths, **given})
    if given:
        name, value = next(iter(given.items()))
        raise Refused(f"--{name.replace('_', '-')} {value} needs --multi-latent-attention; add it")
    return None


def _head_width(model: ModelConfig, hidden_size: int, heads: int) -> int:
    if model.kv_channels is not None:
        return model.kv_channels
    if hidden_size % heads:
        raise Refused(
            f"--hidden-size {hidden_size} is not divisible by --num-attention-heads {heads}; give "
            "--kv-channels"
        )
    return hidden_size // heads


def _query_groups(model: ModelConfig, heads: int) -> int:
    if model.group_query_attention:
        groups = model.num_query_groups or 1
    elif model.num_query_groups in (None, heads):
        groups = heads
    else:
        raise Refused(f"--num-query-groups {model.num_query_groups} needs --group-query-attention; add it")
    if heads % groups:
        raise Refused(f"--num-query-groups {groups} does not divide --num-attention-heads {heads}")
    return groups
