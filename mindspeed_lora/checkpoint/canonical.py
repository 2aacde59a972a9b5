"""The canonical space: names, full shapes and sharding rules of the unsharded Megatron-core model.

Every format reads and writes these names; layouts are ranges of these tensors. Layer numbers and those of experts
(``mlp.experts.local_experts.7.linear_fc1``) are global; what TP is for other tensors, ETP is for an expert's.
Adapter factors are ``<module>.lora_a`` ``[r, in]`` and ``<module>.lora_b`` ``[out, r]``, ``<module>`` being
the linear without ``.weight``, or one matrix of a fused linear (``<linear>.q_proj``). A pair that all experts of a
layer share is ``mlp.experts.linear_fc1.lora_a``, of the shape that one expert's has. Single trained rows of the
vocabulary are ``embedding.word_embeddings.token_rows`` and ``output_layer.token_rows`` ``[n, h]``.
"""

from __future__ import annotations

import functools
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
"""Names of the four linears of a dense layer that take adapters, and their place in it."""
ROUTED = "mlp.experts"
"""Place of what all experts of a layer share."""
EXPERTS = f"{ROUTED}.local_experts"
"""Place of the experts in a layer; a number and the name of a linear follow."""
SHARED_EXPERTS = "mlp.shared_experts"
ROUTER = "mlp.router"

_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)(\..+)$")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_LOCAL_PREFIX = re.compile(r"^(module\.)+")


@dataclass(frozen=True)
class TensorRule:
    """How tensor parallelism cuts a tensor."""

    axis: int | None
    """The axis that is cut, or None where every TP rank holds the whole tensor."""
    blocks: int = 1
    """Into how many stacked blocks the axis falls, each cut by itself (gate above up: 2)."""


_WHOLE = TensorRule(None)
_MATRIX = r"(?:\w+_proj|w1|w3)"
"""Last component of the Hugging Face name of a matrix that adapters name apart; ``w1`` and ``w3`` are Mixtral's."""
_RULES: tuple[tuple[str, TensorRule], ...] = (
    (r"(embedding\.word_embeddings|output_layer)\.weight", TensorRule(0)),
    (
        r".*\.(linear_qkv|linear_q_proj|linear_q_up_proj|linear_kv_up_proj)\.(weight|bias|lora_b)",
        TensorRule(0),
    ),
    (rf".*\.(linear_qkv|linear_fc1)\.{_MATRIX}\.lora_b", TensorRule(0)),
    (rf".*\.(linear_qkv|linear_fc1)\.{_MATRIX}\.lora_a", _WHOLE),
    (r".*\.linear_fc1\.(weight|bias|lora_b)", TensorRule(0, 2)),
    (r".*\.(linear_proj|linear_fc2)\.(weight|lora_a)", TensorRule(1)),
    (r".*\.(linear_proj|linear_fc2)\.(bias|lora_b)", _WHOLE),
    (r".*\.(linear_qkv|linear_q_proj|linear_q_up_proj|linear_kv_up_proj|linear_fc1)\.lora_a", _WHOLE),
    (r".*\.(linear_q_down_proj|linear_kv_down_proj)\.(weight|bias|lora_a|lora_b)", _WHOLE),
    (r".*\.mlp\.(router\.(weight|expert_bias|lora_a|lora_b)|shared_experts\.gate_weight)", _WHOLE),
    (r".*(layernorm|post_attn_norm)\.weight", _WHOLE),
    (r"(embedding\.word_embeddings|output_layer)\.token_rows", _WHOLE),
)


@functools.cache
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
    if shape.post_norm:
        norms += [("post_attn_norm", hidden), ("post_mlp_layernorm", hidden)]
    norms += [(f"self_attention.{name}_layernorm", (size,)) for name, size in _inner_norms(shape).items()]
    tensors: dict[str, tuple[int, ...]] = {f"{prefix}{name}.weight": size for name, size in norms}
    if shape.moe is not None and shape.has_experts(layer):
        tensors[f"{prefix}{ROUTER}.weight"] = (shape.moe.num_experts, shape.hidden_size)
        if shape.moe.expert_bias:
            tensors[f"{prefix}{ROUTER}.expert_bias"] = (shape.moe.num_experts,)
    biased = {
        "self_attention.linear_qkv": shape.add_qkv_bias,
        "self_attention.linear_proj": shape.add_proj_bias,
        "mlp.linear_fc1": shape.add_mlp_bias,
        "mlp.linear_fc2": shape.add_mlp_bias,
    }
    for place, (rows, columns) in layer_linears(shape, layer).items():
        tensors[f"{prefix}{place}.weight"] = (rows, columns)
        if biased.get(place):
            tensors[f"{prefix}{place}.bias"] = (rows,)
    if shape.moe is not None and shape.has_experts(layer) and shape.moe.shared_expert_gate:
        tensors[f"{prefix}{SHARED_EXPERTS}.gate_weight"] = (1, shape.hidden_size)
    return tensors


def _inner_norms(shape: ModelShape) -> dict[str, int]:
    """The norms within attention, and their widths."""
    if shape.mla is not None:
        latent = {} if shape.mla.q_lora_rank is None else {"q": shape.mla.q_lora_rank}
        return {**latent, "kv": shape.mla.kv_lora_rank}
    return dict.fromkeys("qk", shape.kv_channels) if shape.qk_layernorm else {}


def layer_linears(shape: ModelShape, layer: int) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of every linear of a layer that can take an adapter, by its place in the layer."""
    hidden = shape.hidden_size
    places = _attention_linears(shape)
    if shape.moe is None or shape.moe.is_dense(layer):
        return places | _mlp_linears("mlp", hidden, shape.ffn_hidden_size)
    for expert in range(shape.moe.num_experts):
        places |= _mlp_linears(f"{EXPERTS}.{expert}", hidden, shape.moe.ffn_hidden_size)
    if shape.moe.shared_ffn_hidden_size:
        places |= _mlp_linears(SHARED_EXPERTS, hidden, shape.moe.shared_ffn_hidden_size)
    return places


def _attention_linears(shape: ModelShape) -> dict[str, tuple[int, int]]:
    hidden, mla, heads = shape.hidden_size, shape.mla, shape.num_attention_heads
    if mla is None:
        places = {"linear_qkv": (shape.qkv_size, hidden)}
    else:
        if mla.q_lora_rank is None:
            places = {"linear_q_proj": (heads * mla.head_size, hidden)}
        else:
            places = {
                "linear_q_down_proj": (mla.q_lora_rank, hidden),
                "linear_q_up_proj": (heads * mla.head_size, mla.q_lora_rank),
            }
        places["linear_kv_down_proj"] = (mla.kv_lora_rank + mla.qk_pos_emb_head_dim, hidden)
        places["linear_kv_up_proj"] = (heads * (mla.qk_head_dim + mla.v_head_dim), mla.kv_lora_rank)
    places["linear_proj"] = (hidden, shape.proj_input_size)
    return {f"self_attention.{name}": size for name, size in places.items()}


def _mlp_linears(place: str, hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    return {f"{place}.linear_fc1": (2 * inner, hidden), f"{place}.linear_fc2": (hidden, inner)}


def linear_shapes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of each of the four linears of a dense layer."""
    return {
        "linear_qkv": (shape.qkv_size, shape.hidden_size),
        "linear_proj": (shape.hidden_size, shape.proj_input_size),
        "linear_fc1": (2 * shape.ffn_hidden_size, shape.hidden_size),
        "linear_fc2": (shape.hidden_size, shape.ffn_hidden_size),
    }


def adapter_linears(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Canonical name (``decoder.layers.3.mlp.linear_fc1``) and ``(out, in)`` of every linear that takes an adapter."""
    return {
        f"decoder.layers.{layer}.{place}": size
        for layer in range(shape.num_layers)
        for place, size in layer_linears(shape, layer).items()
    }


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


def linear_kind(module: str) -> str:
    """What a linear is in its layer: ``linear_qkv``; of an MLP also whose, as in ``experts.linear_fc1``.

    All experts of a model are one kind, and so are all shared experts (``shared_experts.linear_fc2``).
    """
    place, _, linear = module.rpartition(".")
    if f".{ROUTED}" in place:
        return f"experts.{linear}"
    return f"shared_experts.{linear}" if place.endswith(SHARED_EXPERTS) else linear


def of_all_experts(module: str) -> str:
    """The name of an expert's linear without its number: ``decoder.layers.3.mlp.experts.linear_fc1``."""
    return _EXPERT.sub(".", module)


def expert_number(name: str) -> int | None:
    """The expert's number in a name, local or global as the name is; None outside of the experts."""
    match = _EXPERT.search(name)
    return None if match is None else int(match.group(1))
