"""Names in megatron-core's distributed checkpoints, and the canonical tensors that they mean.

A tensor of all layers is stacked on axis 0 under a name without a number (``decoder.layers.mlp.linear_fc2.weight``
``[L, h, f]``), or each layer's is stored alone under its number, as where layers differ. The two norms of a layer have
the names that Transformer Engine gives them, as parts of the linears behind them; megatron-core's other layers write
them so too, but not those of latent attention.

All experts of a layer are stacked on one more axis (``decoder.layers.mlp.experts.experts.linear_fc1.weight``
``[L, E, 2f, h]``), whether they ran one by one or grouped; or each is stored under its number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mindspeed_lora.checkpoint.canonical import EXPERTS
from mindspeed_lora.config.shape import ModelShape

_PREFIX = re.compile(r"^((module|model)\.)+")
_LAYERS = "decoder.layers."
_NUMBERED = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_LATENT_NORMS = {
    f"self_attention.{kind}_layernorm.weight": f"self_attention.linear_{kind}_up_proj.layer_norm_weight"
    for kind in ("q", "kv")
}
"""Transformer Engine's norms of the latent vectors."""
_NORMS_BACK = {stored: name for name, stored in (_NORMS | _LATENT_NORMS).items()}
_EXPERT = re.compile(r"mlp\.experts\.experts\.(?:(\d+)\.)?(linear_fc[12]\.weight)(?:_([wv]))?")
_CANONICAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
_HALF = re.compile(r"(mlp\.linear_fc1\.(?:weight|bias))_([wv])")
"""Gate and up of ``linear_fc1`` as tensors of their own (``singleton_local_shards``)."""

_ADAPTER = re.compile(r".*lora_[ABab].*|(?:.*\.)?adapters?\..*")
_OTHER = re.compile(
    r"(chained_\d+\.)?optimizer\..*|.*_extra_state.*|.*rotary_pos_emb\.inv_freq"
    r"|(rng_state|rerun_state_machine_state|opt_param_scheduler)\b.*"
)

STACKED = -1
"""Stands for the number of a layer or expert in the place of a tensor that has all of them."""


@dataclass(frozen=True)
class Place:
    """What a stored tensor is."""

    name: str
    """Canonical name; of a layer's tensor, what follows the number."""
    layer: int | None = None
    """The layer's number, :data:`STACKED`, or None outside of the layers."""
    half: int | None = None
    """0 for gate, 1 for up, where ``linear_fc1`` is stored as two tensors."""
    expert: int | None = None
    """An expert's number, :data:`STACKED`, or None where it is none's; ``name`` is then that of its linear."""

    @property
    def num_stacked(self) -> int:
        """Leading axes of the stored tensor that are not the canonical one's."""
        return (self.layer == STACKED) + (self.expert == STACKED)


def is_adapter(key: str) -> bool:
    """Whether an entry belongs to an adapter that is not merged."""
    return _ADAPTER.fullmatch(key) is not None


def is_weight(key: str) -> bool:
    """Whether an entry is a weight of the base model: no optimizer state, no adapter, nothing of a kernel's."""
    return not is_adapter(key) and _OTHER.fullmatch(_PREFIX.sub("", key)) is None


def place_of(key: str) -> Place:
    """What the tensor under a key is."""
    name = _PREFIX.sub("", key).replace(".base_layer.", ".")
    numbered = _NUMBERED.fullmatch(name)
    if numbered is not None:
        layer, rest = int(numbered[1]), numbered[2]
    elif name.startswith(_LAYERS):
        layer, rest = STACKED, name.removeprefix(_LAYERS)
    else:
        return Place(name)
    expert = _EXPERT.fullmatch(rest)
    if expert is not None:
        number = STACKED if expert[1] is None else int(expert[1])
        return Place(expert[2], layer, None if expert[3] is None else "wv".index(expert[3]), number)
    half = _HALF.fullmatch(rest)
    if half is not None:
        return Place(half[1], layer, "wv".index(half[2]))
    return Place(_NORMS_BACK.get(rest, rest), layer)


def canonical_name(name: str, layer: int | None, expert: int | None = None) -> str:
    """The canonical name of a place of that name; ``layer`` is the model's, without no-ops."""
    if layer is None:
        return name
    return f"{_LAYERS}{layer}.{name if expert is None else f'{EXPERTS}.{expert}.{name}'}"


class Naming:
    """Under which keys megatron-core stores the tensors of a model.

    Args:
        shape: of the model.
        slot_of: place of each layer among the layers as the model is built.
        transformer_engine: whether the model is of Transformer Engine's layers.
    """

    def __init__(
        self, shape: ModelShape, slot_of: Mapping[int, int], transformer_engine: bool = False
    ) -> None:
        self._shape, self._slot_of, self._is_te = shape, slot_of, transformer_engine
        self.is_stacked = shape.moe is None or not shape.moe.dense_layers
        """Whether layers are stacked; where some have experts and some have not, each is stored alone."""

    def key(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The key of a canonical tensor, and its place on the axes before its own: of the layer, of the expert."""
        numbered = _NUMBERED.fullmatch(name)
        if numbered is None:
            return name, ()
        layer, rest = int(numbered[1]), numbered[2]
        prefix, front = self.layer(layer)
        expert = _CANONICAL_EXPERT.fullmatch(rest)
        if expert is not None:
            return f"{prefix}mlp.experts.experts.{expert[2]}", (*front, int(expert[1]))
        return prefix + self._norms(layer).get(rest, rest), front

    def layer(self, layer: int) -> tuple[str, tuple[int, ...]]:
        """The beginning of the keys of a layer, and its place on the layers' axis if there is one."""
        slot = self._slot_of[layer]
        return (_LAYERS, (slot,)) if self.is_stacked else (f"{_LAYERS}{slot}.", ())

    def _norms(self, layer: int) -> Mapping[str, str]:
        """Names of norms that are stored under others."""
        if not self._is_te:
            return _NORMS if self._shape.mla is None else {}
        norms = dict(_NORMS)
        if self._shape.has_experts(layer):
            del norms["pre_mlp_layernorm.weight"]
        if self._shape.mla is not None:
            del norms["input_layernorm.weight"]
            norms |= _LATENT_NORMS
        return norms
