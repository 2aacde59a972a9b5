"""Megatron rank files built from Hugging Face tensors by code of its own, in the forms that other programs write."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
Change = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Layout:
    """How many ranks, stages, and chunks a stage."""

    tp: int = 1
    pp: int = 1
    vp: int = 1

    def layers(self, pp_rank: int, chunk: int, count: int) -> range:
        """Global layers of one chunk, in equal chunks counted through stage by stage."""
        size = count // (self.pp * self.vp)
        first = (chunk * self.pp + pp_rank) * size
        return range(first, first + size)


def fused_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: int) -> torch.Tensor:
    """Rows by query group: its query heads, its key head, its value head."""
    parts = [matrix.reshape(groups, -1, *matrix.shape[1:]) for matrix in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def rows(matrix: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """One rank's equal share of the rows."""
    return matrix.chunk(size, dim=0)[rank].clone()


def columns(matrix: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """One rank's equal share of the columns."""
    return matrix.chunk(size, dim=1)[rank].clone()


def gate_up(gate: torch.Tensor, up: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """One rank's rows of gate above its rows of up."""
    return torch.cat([rows(gate, rank, size), rows(up, rank, size)])


def base_layer(hf: Tensors, layer: int, groups: int, rank: int, tp: int) -> Tensors:
    """One layer's tensors of one rank, under the names within a layer."""
    get = {name.split(f"layers.{layer}.")[1]: t for name, t in hf.items() if f".layers.{layer}." in name}
    found = {
        "input_layernorm.weight": get["input_layernorm.weight"],
        "pre_mlp_layernorm.weight": get["post_attention_layernorm.weight"],
        "self_attention.linear_proj.weight": columns(get["self_attn.o_proj.weight"], rank, tp),
        "mlp.linear_fc1.weight": gate_up(get["mlp.gate_proj.weight"], get["mlp.up_proj.weight"], rank, tp),
        "mlp.linear_fc2.weight": columns(get["mlp.down_proj.weight"], rank, tp),
    }
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" in get:
            q, k, v = (get[f"self_attn.{name}_proj.{kind}"] for name in "qkv")
            found[f"self_attention.linear_qkv.{kind}"] = rows(fused_qkv(q, k, v, groups), rank, tp)
    return found


def factors_of_layer(adapter: Tensors, layer: int, groups: int, rank: int, tp: int) -> Tensors:
    """One layer's factors of one rank as MindSpeed-LLM has them; ``adapter`` has PEFT's names, q/k/v with one A."""

    def factor(module: str, one: str) -> torch.Tensor:
        return adapter[f"base_model.model.model.layers.{layer}.{module}.lora_{one}.weight"]

    qkv = fused_qkv(*(factor(f"self_attn.{name}_proj", "B") for name in "qkv"), groups)
    values = {
        ("self_attention.linear_qkv", "A"): factor("self_attn.q_proj", "A"),
        ("self_attention.linear_qkv", "B"): rows(qkv, rank, tp),
        ("self_attention.linear_proj", "A"): columns(factor("self_attn.o_proj", "A"), rank, tp),
        ("self_attention.linear_proj", "B"): factor("self_attn.o_proj", "B"),
        ("mlp.linear_fc1", "A"): factor("mlp.gate_proj", "A"),
        ("mlp.linear_fc1", "B"): gate_up(factor("mlp.gate_proj", "B"), factor("mlp.up_proj", "B"), rank, tp),
        ("mlp.linear_fc2", "A"): columns(factor("mlp.down_proj", "A"), rank, tp),
        ("mlp.linear_fc2", "B"): factor("mlp.down_proj", "B"),
    }
    return {f"{module}.lora_{one}.default.weight": value for (module, one), value in values.items()}


def padded(matrix: torch.Tensor, tp: int) -> torch.Tensor:
    """With the last row repeated until it divides, as MindSpeed-LLM pads a vocabulary."""
    return torch.cat([matrix, matrix[-1:].expand(-len(matrix) % tp, -1)])


def args_of(config: Any, layout: Layout, **more: Any) -> argparse.Namespace:
    """What Megatron's ``args`` say of a transformers configuration in a layout."""
    rope = config.rope_parameters
    values = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": config.num_key_value_heads != config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": None,
        "max_position_embeddings": config.max_position_embeddings,
        "norm_epsilon": config.rms_norm_eps,
        "rotary_base": rope["rope_theta"],
        "use_rope_scaling": rope["rope_type"] == "llama3",
        "rope_scaling_type": "llama3" if rope["rope_type"] == "llama3" else None,
        "rope_scaling_factor": rope.get("factor"),
        "original_max_position_embeddings": rope.get("original_max_position_embeddings"),
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
    }
    return argparse.Namespace(**{**values, **more})


def write_ranks(
    folder: Path,
    config: Any,
    layout: Layout,
    base: Tensors | None = None,
    adapter: Tensors | None = None,
    args: Mapping[str, Any] | None = None,
    change: Change = lambda content: None,
    name: str = "iter_0000001",
) -> Path:
    """Write ``<folder>/<name>/mp_rank_*``; ``change`` sees each rank's content before it is saved."""
    tp, groups = layout.tp, config.num_key_value_heads
    for tp_rank in range(tp):
        for pp_rank in range(layout.pp):
            content: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": 1}
            content["args"] = args_of(config, layout, **(args or {}))
            for chunk in range(layout.vp):
                model: Tensors = {}
                for local, layer in enumerate(layout.layers(pp_rank, chunk, config.num_hidden_layers)):
                    own: Tensors = {}
                    if base is not None:
                        own.update(base_layer(base, layer, groups, tp_rank, tp))
                    if adapter is not None:
                        own.update(factors_of_layer(adapter, layer, groups, tp_rank, tp))
                    model.update({f"decoder.layers.{local}.{key}": value for key, value in own.items()})
                if base is not None and pp_rank == chunk == 0:
                    words = padded(base["model.embed_tokens.weight"], tp)
                    model["embedding.word_embeddings.weight"] = rows(words, tp_rank, tp)
                if base is not None and (pp_rank, chunk) == (layout.pp - 1, layout.vp - 1):
                    model["decoder.final_layernorm.weight"] = base["model.norm.weight"]
                    model["output_layer.weight"] = rows(padded(base["lm_head.weight"], tp), tp_rank, tp)
                content["model" if layout.vp == 1 else f"model{chunk}"] = model
            change(content)
            stage = f"_{pp_rank:03d}" if layout.pp > 1 else ""
            path = folder / name / f"mp_rank_{tp_rank:02d}{stage}" / "model_optim_rng.pt"
            path.parent.mkdir(parents=True)
            torch.save(content, path)
    latest = "release" if name == "release" else str(int(name.rpartition("_")[2]))
    (folder / "latest_checkpointed_iteration.txt").write_text(latest)
    return folder
