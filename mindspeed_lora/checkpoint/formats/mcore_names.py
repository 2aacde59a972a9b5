"""Names in other programs' Megatron files, as those of megatron-core's local spec.

* wrappers: ``module.`` and PEFT's ``base_model.model.`` before a name, ``.base_layer`` within it;
* Transformer Engine: a layer norm within the linear that follows it (``linear_qkv.layer_norm_weight``);
* Megatron-LM before megatron-core: ``language_model.encoder.layers.N.self_attention.query_key_value.weight``, nested
  dictionaries or flat.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.checkpoint.canonical import layer_number, without_wrappers
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused

_ADAPTER = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")
"""A factor as PEFT names it, wrapped around Megatron's linears."""
_STACKED_FACTOR = re.compile(r".+\.mlp\.experts\.weight[12]_lora_[ab]")
"""One factor of all experts in a file, as MindSpeed-LLM's grouped experts have it."""
_ADAPTER_OF_EXPERTS = re.compile(r".*lora_[ABab].*")
_IDLE = re.compile(
    r".*\._extra_state\d*|.*rotary_pos_emb\.inv_freq|.*\.rotary_emb\.inv_freq"
    r"|.*\.router\.(local_tokens_per_expert|global_tokens_per_expert|ga_steps)"
)
"""Entries that hold nothing learned: TE's state, rotary tables and counts of routed tokens."""

_OLD_LAYER = r"(?P<layer>layers\.\d+)\."
_OLD_NAMES: tuple[tuple[str, str], ...] = (
    (r"language_model\.(encoder|transformer)\.", "decoder."),
    (r"language_model\.", ""),
    (rf"decoder\.{_OLD_LAYER}attention\.", r"decoder.\g<layer>.self_attention."),
    (
        rf"decoder\.{_OLD_LAYER}(post_attention_layernorm|post_attention_norm)\.",
        r"decoder.\g<layer>.pre_mlp_layernorm.",
    ),
    (rf"decoder\.{_OLD_LAYER}input_norm\.", r"decoder.\g<layer>.input_layernorm."),
    (r"decoder\.final_norm\.", "decoder.final_layernorm."),
    (
        rf"decoder\.{_OLD_LAYER}self_attention\.query_key_value\.",
        r"decoder.\g<layer>.self_attention.linear_qkv.",
    ),
    (rf"decoder\.{_OLD_LAYER}self_attention\.dense\.", r"decoder.\g<layer>.self_attention.linear_proj."),
    (rf"decoder\.{_OLD_LAYER}mlp\.dense_h_to_4h\.", r"decoder.\g<layer>.mlp.linear_fc1."),
    (rf"decoder\.{_OLD_LAYER}mlp\.dense_4h_to_h\.", r"decoder.\g<layer>.mlp.linear_fc2."),
)
"""Beginnings of the names before megatron-core, rewritten one after the other."""

_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine's names of the norms that it computes with the linear after them."""

_PLACES = (
    (r"\.mlp\.experts\.(linear_fc[12])\.(weight)(\d+)(?=$|\.)", r".mlp.experts.local_experts.\3.\1.\2"),
    (r"\.mlp\.shared_expert_gate\.weight$", ".mlp.shared_experts.gate_weight"),
    (r"\.mlp\.shared_expert\.", ".mlp.shared_experts."),
    (r"\.self_attention\.linear_(q|kv)b(?=\.|$)", r".self_attention.linear_\1_up_proj"),
    (r"\.self_attention\.linear_(q|kv)_up_proj\.layer_norm_weight$", r".self_attention.\1_layernorm.weight"),
)
"""Other names within a layer: grouped experts of Transformer Engine, its norms before the latent projections, and
MindSpeed-LLM's of gates and latent projections."""


def with_fused_norm(local_name: str, name: str, shape: ModelShape) -> str:
    """Transformer Engine's name of a tensor, given that of the local specification and the canonical one.

    The norm before experts stays by itself, and with latent attention the one before it; those of its latent vectors
    are then within the projections.
    """
    layer = layer_number(name)
    if layer is None:
        return local_name
    fused = {norm: place for place, norm in _FUSED_NORMS.items()}
    if shape.has_experts(layer):
        del fused["pre_mlp_layernorm.weight"]
    if shape.mla is not None:
        del fused["input_layernorm.weight"]
        for kind in ("q", "kv"):
            fused[f"self_attention.{kind}_layernorm.weight"] = (
                f"self_attention.linear_{kind}_up_proj.layer_norm_weight"
            )
    plain = local_name.split(".", 3)[3]
    return local_name.removesuffix(plain) + fused.get(plain, plain)


def flat_entries(model: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Entries of a model by their full names, whether it is flat or dictionaries within dictionaries."""
    # The methods of dict itself: a pickle can put attributes of these names on an OrderedDict.
    for name, value in dict.items(model):
        if isinstance(value, dict):
            yield from flat_entries(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def weights(model: Any, path: Path) -> dict[str, torch.Tensor]:
    """The base's tensors of a model chunk, by megatron-core's names with the chunk's layer numbers.

    Raises:
        Refused: one is of a kind that no model here has, or is no tensor, or is there twice.
    """
    found: dict[str, torch.Tensor] = {}
    for stored, value in flat_entries(model):
        if _IDLE.fullmatch(stored) or is_adapter(stored):
            continue
        name = megatron_name(stored)
        if name.endswith(".layer_norm_bias"):
            raise Refused(f"{path}: {stored}: a layer norm with a bias is not supported; expected RMSNorm.")
        if not isinstance(value, torch.Tensor):
            raise Refused(f"{path}: {stored} is no tensor ({type(value).__name__}).")
        if name in found:
            raise Refused(f"{path}: {stored} is there twice, under another name too.")
        found[name] = value
    return found


def factors(model: Any, path: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors of a model chunk: ``<linear>.lora_a`` and ``.lora_b``, with the chunk's layer numbers.

    Those that stack experts keep their names (``mlp.experts.weight1_lora_a``).

    Raises:
        Refused: one is of a kind that is not supported, or is there twice.
    """
    found: dict[str, torch.Tensor] = {}
    for stored, value in flat_entries(model):
        if not is_adapter(stored):
            continue
        match, stacked = _ADAPTER.fullmatch(stored), _STACKED_FACTOR.fullmatch(stored)
        if not (match or stacked) or not isinstance(value, torch.Tensor):
            raise Refused(
                f"{path}: {stored} is no factor of a linear; expected names like "
                "decoder.layers.0.mlp.linear_fc1.lora_A.default.weight."
            )
        name = megatron_name(stored)
        if match is not None:
            name = f"{megatron_name(match['module'])}.lora_{match['factor'].lower()}"
        if name in found:
            raise Refused(f"{path}: {stored} is there twice, under another name too.")
        found[name] = value
    return found


def is_adapter(stored: str) -> bool:
    """Whether an entry belongs to an adapter."""
    return _ADAPTER_OF_EXPERTS.fullmatch(stored) is not None


def is_before_mcore(model: Mapping[str, Any]) -> bool:
    """Whether a model has the names from before megatron-core, whose q/k/v order depends on the file's version."""
    return any(".query_key_value." in stored for stored, _ in flat_entries(model))


@functools.lru_cache(maxsize=1 << 17)
def megatron_name(stored: str) -> str:
    """megatron-core's name of an entry, or of a module."""
    # The dot at the end lets the name of a module match the beginnings of its parameters' names.
    name = f"{without_wrappers(stored.replace('base_model.model.', ''))}."
    for pattern, replacement in _OLD_NAMES:
        name = re.sub(f"^{pattern}", replacement, name)
    name = name.removesuffix(".").replace(".base_layer.", ".")
    for pattern, replacement in _PLACES:
        name = re.sub(pattern, replacement, name)
    for fused, norm in _FUSED_NORMS.items():
        if name.endswith(f".{fused}"):
            return f"{name.removesuffix(fused)}{norm}"
    return name
