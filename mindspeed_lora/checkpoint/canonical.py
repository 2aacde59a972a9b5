"""The canonical space: names, full shapes and sharding rules of the unsharded Megatron-core model.

Every format reads and writes these names; layouts are ranges of these tensors. Layer numbers are global.
Adapter factors are ``<module>.lora_a`` ``[r, in]`` and ``<module>.lora_b`` ``[out, r]``, ``<module>`` being
the linear without ``.weight``, or one matrix of a fused linear (``<linear>.q_proj``). Single trained rows of the
vocabulary are ``embedding.word_embeddings.token_rows`` and ``output_layer.token_rows`` ``[n, h]``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mindspeed_lora.config.shape import ModelShape

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
FINAL_LAYERNORM = "decoder.final_layernorm.weight"
VOCABULARY_TENSORS = (EMBEDDING, OUTPUT_LAYER)

LINEARS = {
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}
"""Names of the four linears that take adapters, and their place in a layer."""

_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)(\..+)$")
_LOCAL_PREFIX = re.compile(r"^(module\.)+")


@dataclass(frozen=True)
class TensorRule:
    """How tensor parallelism cuts a tensor."""

    axis: int | None
    """The axis that is cut, or None where every TP rank holds the whole tensor."""
    blocks: int = 1
    """Into how many stacked blocks the axis falls, each cut by itself (gate above up: 2)."""


_WHOLE = TensorRule(None)
_RULES: tuple[tuple[str, TensorRule], ...] = (
    (r"(embedding\.word_embeddings|output_layer)\.weight", TensorRule(0)),
    (r".*\.linear_qkv\.(weight|bias|lora_b)", TensorRule(0)),
    (r".*\.(linear_qkv|linear_fc1)\.\w+_proj\.lora_b", TensorRule(0)),
    (r".*\.(linear_qkv|linear_fc1)\.\w+_proj\.lora_a", _WHOLE),
    (r".*\.linear_fc1\.(weight|bias|lora_b)", TensorRule(0, 2)),
    (r".*\.(linear_proj|linear_fc2)\.(weight|lora_a)", TensorRule(1)),
    (r".*\.(linear_proj|linear_fc2)\.(bias|lora_b)", _WHOLE),
    (r".*\.(linear_qkv|linear_fc1)\.lora_a", _WHOLE),
    (r".*layernorm\.weight", _WHOLE),
    (r"(embedding\.word_embeddings|output_layer)\.token_rows", _WHOLE),
)


def tensor_rule(name: str) -> TensorRule:
    """The rule of a canonical tensor or adapter factor."""
    for pattern, rule in _RULES:
        if re.fullmatch(pattern, name):
            return rule
    raise ValueError(f"{name}: not a canonical tensor name")


def canonical_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and full shape of every tensor of the model, in the order of the forward pass."""
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab_size, shape.hidden_size)}
    for layer in range(shape.num_layers):
        tensors.update(layer_tensors(shape, layer))
    tensors[FINAL_LAYERNORM] = (shape.hidden_size,)
    if shape.untie_embeddings_and_output_weights:
        tensors[OUTPUT_LAYER] = (shape.vocab_size, shape.hidden_size)
    return tensors


def layer_tensors(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...]]:
    """Name and full shape of the tensors of one layer."""
    prefix, hidden = f"decoder.layers.{layer}.", (shape.hidden_size,)
    norms = [("input_layernorm", hidden), ("pre_mlp_layernorm", hidden)]
    if shape.qk_layernorm:
        norms += [(f"self_attention.{name}_layernorm", (shape.kv_channels,)) for name in "qk"]
    tensors: dict[str, tuple[int, ...]] = {f"{prefix}{name}.weight": size for name, size in norms}
    biased = {
        "linear_qkv": shape.add_qkv_bias,
        "linear_proj": shape.add_proj_bias,
        "linear_fc1": shape.add_mlp_bias,
        "linear_fc2": shape.add_mlp_bias,
    }
    for linear, (rows, columns) in linear_shapes(shape).items():
        tensors[f"{prefix}{LINEARS[linear]}.weight"] = (rows, columns)
        if biased[linear]:
            tensors[f"{prefix}{LINEARS[linear]}.bias"] = (rows,)
    return tensors


def linear_shapes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of each of the four linears."""
    return {
        "linear_qkv": (shape.qkv_size, shape.hidden_size),
        "linear_proj": (shape.hidden_size, shape.proj_input_size),
        "linear_fc1": (2 * shape.ffn_hidden_size, shape.hidden_size),
        "linear_fc2": (shape.hidden_size, shape.ffn_hidden_size),
    }


def adapter_modules(num_layers: int) -> list[str]:
    """Canonical names (``decoder.layers.3.mlp.linear_fc1``) of the linears that take adapters, of every layer."""
    return [f"decoder.layers.{layer}.{place}" for layer in range(num_layers) for place in LINEARS.values()]


def padded_vocab_size(shape: ModelShape, divisible_by: int, tp_size: int) -> int:
    """The vocabulary rounded up to a multiple of ``divisible_by`` × TP."""
    multiple = divisible_by * tp_size
    return -(-shape.vocab_size // multiple) * multiple


def shard_ranges(rule: TensorRule, size: int, tp_rank: int, tp_size: int) -> list[tuple[int, int]]:
    """Ranges along the rule's axis, of ``size``, that one TP rank holds, in its local order.

    For a vocabulary tensor ``size`` is the padded vocabulary; an uncut tensor has one range, all of it.
    """
    if rule.axis is None:
        return [(0, size)]
    block = size // rule.blocks
    if size % rule.blocks or block % tp_size:
        raise ValueError(f"size {size} does not divide into {rule.blocks} blocks over {tp_size} TP ranks")
    width = block // tp_size
    return [
        (index * block + tp_rank * width, index * block + (tp_rank + 1) * width)
        for index in range(rule.blocks)
    ]


def without_wrappers(local_name: str) -> str:
    """The name without the ``module.`` prefixes of wrappers and the ``.base_layer`` under an adapter."""
    return _LOCAL_PREFIX.sub("", local_name).replace(".base_layer.", ".")


def to_canonical(local_name: str, layers: Sequence[int | None] | Mapping[int, int]) -> str:
    """Canonical name of a parameter of a model chunk; ``layers`` has the layer of each local number."""
    name = without_wrappers(local_name)
    match = _LAYER.match(name)
    if match is None:
        return name
    return f"{match.group(1)}{layers[int(match.group(2))]}{match.group(3)}"


def to_local(name: str, layers: Sequence[int | None]) -> str:
    """The name of a canonical tensor within the chunk that holds these layers, local number by local number."""
    match = _LAYER.match(name)
    if match is None:
        return name
    return f"{match.group(1)}{layers.index(int(match.group(2)))}{match.group(3)}"


def layer_number(name: str) -> int | None:
    """The layer's number in a name, local or canonical as the name is; None outside of the layers."""
    match = _LAYER.match(without_wrappers(name))
    return None if match is None else int(match.group(2))
