"""Multi-latent attention in the rank files of other programs, brought to the canonical tensors.

* MindSpeed-LLM packs the projections to the latent vectors in ``linear_qkv``, queries' rows above keys' and values',
  whole on every tensor-parallel rank, and calls the second norm ``k_layernorm``; an adapter on it has one A for both;
* megatron-core's own layers (its local specification) cut the down projections over the tensor-parallel ranks, which
  Transformer Engine's and MindSpeed-LLM's hold whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mindspeed_lora.checkpoint.canonical import TensorRule, tensor_rule
from mindspeed_lora.checkpoint.storage.safetensors_file import TensorEntry
from mindspeed_lora.config.shape import MLAShape, ModelShape

_PACKED = re.compile(r"(.+\.self_attention\.)linear_qkv\.(weight|lora_a|lora_b)")
_NORM = ".self_attention.k_layernorm.weight"
_DOWN = (".linear_q_down_proj.weight", ".linear_kv_down_proj.weight")


def latent_entries(
    local_name: str, entry: TensorEntry, shape: ModelShape
) -> Iterator[tuple[str, TensorEntry]]:
    """The tensors that an entry of a file stands for: itself, or those of latent attention that it packs."""
    mla, packed = shape.mla, _PACKED.fullmatch(local_name)
    if mla is not None and local_name.endswith(_NORM):
        yield local_name.replace(".k_layernorm.", ".kv_layernorm."), entry
    elif mla is not None and packed is not None and len(entry.shape) == 2:
        yield from _unpacked(packed[1], packed[2], entry, mla)
    else:
        yield local_name, entry


def _unpacked(place: str, kind: str, entry: TensorEntry, mla: MLAShape) -> Iterator[tuple[str, TensorEntry]]:
    """Both matrices' rows; of an adapter's A all of them twice."""
    rows, columns = entry.shape
    shared = mla.kv_lora_rank + mla.qk_pos_emb_head_dim
    queries = "linear_q_proj" if mla.q_lora_rank is None else "linear_q_down_proj"
    first = second = entry
    if kind != "lora_a":
        first = TensorEntry(entry.dtype, (rows - shared, columns), entry.offset)
        second = TensorEntry(entry.dtype, (shared, columns), entry.offset + first.num_bytes)
    yield f"{place}{queries}.{kind}", first
    yield f"{place}linear_kv_down_proj.{kind}", second


def rule_in_files(name: str, shards: Sequence[TensorEntry], full: Sequence[int]) -> TensorRule:
    """How a canonical tensor is cut over its ranks, as their shapes tell where there are two ways."""
    rule = tensor_rule(name)
    if name.endswith(_DOWN) and len(shards) > 1 and shards[0].shape[0] * len(shards) == full[0]:
        return TensorRule(0)
    return rule
