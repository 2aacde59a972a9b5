"""Flags against the model's resolved shape, once that is known."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mindspeed_lora.config.model import ModelConfig
from mindspeed_lora.config.model_features import refuse_unbuilt
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.rotary_flags import check_rotary, differing_rotary, same_value
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.config.shape_flags import FEATURE_FLAGS, MLA_FLAGS
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
    pairs += [(flag, getattr(model, flag), getattr(shape.mla, flag, None)) for flag in MLA_FLAGS]
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
    pairs = [(flag, getattr(model, flag), shape.feature(flag)) for flag in FEATURE_FLAGS]
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
