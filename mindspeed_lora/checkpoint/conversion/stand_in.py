"""A shape with the modules of an adapter's model, which need not be here; its sizes mean nothing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

from mindspeed_lora.checkpoint.peft.description import hf_linears
from mindspeed_lora.checkpoint.peft.rules import layer_index
from mindspeed_lora.config.shape import MLAShape, ModelShape, MoEShape
from mindspeed_lora.models.families import FAMILIES

_EXPERT = re.compile(r".*\.(\d+)\.[^.]*\.?experts\.(\d+)\.\w+")
_SIZE = 2


def stand_in(modules: Collection[str]) -> ModelShape:
    """The shape of the first family that has modules of these full Hugging Face names."""
    layers = 1 + max(layer_index(module, ()) or 0 for module in modules)
    moe, mla = _moe(modules, layers), _mla(modules)
    needed = [row for row, part in (("local_experts", moe), ("linear_kv_down_proj", mla)) if part]
    fitting = (
        name
        for name, family in FAMILIES.items()
        if all(any(word in row.canonical for row in family.table) for word in needed)
        and set(modules) <= _linears(dataclasses.replace(_meaningless(name, layers), moe=moe, mla=mla))
    )
    family = next(fitting, "qwen3_moe" if moe else "llama")
    # Qwen3 has all tensors of the families with Llama's names.
    return dataclasses.replace(
        _meaningless("qwen3" if family == "llama" else family, layers), moe=moe, mla=mla
    )


def _linears(shape: ModelShape) -> set[str]:
    return {module for names in hf_linears(shape).values() for module in names}


def _moe(modules: Collection[str], layers: int) -> MoEShape | None:
    found = [(int(match[1]), int(match[2])) for match in map(_EXPERT.fullmatch, modules) if match]
    if not found:
        return None
    return MoEShape(
        num_experts=1 + max(expert for _, expert in found),
        topk=1,
        ffn_hidden_size=_SIZE,
        dense_layers=tuple(set(range(layers)) - {layer for layer, _ in found}),
        shared_ffn_hidden_size=_SIZE if any(".shared_expert" in module for module in modules) else 0,
    )


def _mla(modules: Collection[str]) -> MLAShape | None:
    last = {module.rpartition(".")[2] for module in modules}
    if not last & {"kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj", "q_b_proj"}:
        return None
    return MLAShape(
        q_lora_rank=None if "q_proj" in last else _SIZE,
        kv_lora_rank=_SIZE,
        qk_head_dim=_SIZE,
        qk_pos_emb_head_dim=_SIZE,
        v_head_dim=_SIZE,
    )


def _meaningless(family: str, layers: int) -> ModelShape:
    return ModelShape(
        family=family,
        num_layers=layers,
        hidden_size=_SIZE,
        ffn_hidden_size=_SIZE,
        num_attention_heads=_SIZE,
        num_query_groups=_SIZE,
        kv_channels=_SIZE,
        vocab_size=_SIZE,
        max_position_embeddings=_SIZE,
        qk_layernorm=True,
    )
