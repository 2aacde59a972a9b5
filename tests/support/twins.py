"""Models that transformers does not have, as the same weights under another family's names that it does have.

What is written here are the names, shapes and keys of config.json of the published files; none comes from the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
_KEPT = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *(
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
    ),
)


def _internlm2(config: dict[str, Any], theirs: Tensors) -> tuple[dict[str, Any], Tensors]:
    """InternLM2.5 out of Llama: ``wqkv`` has the queries of a group, then its key, then its value."""
    groups = config["num_key_value_heads"]
    names = {
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    ours = _renamed(theirs, names)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        parts = [ours.pop(f"{prefix}self_attn.{one}_proj.weight").unflatten(0, (groups, -1)) for one in "qkv"]
        ours[f"{prefix}attention.wqkv.weight"] = torch.cat(parts, dim=1).flatten(0, 1)
    own = {
        "model_type": "internlm2",
        "architectures": ["InternLM2ForCausalLM"],
        "bias": False,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "head_dim": config["head_dim"],
    }
    return {**_kept(config), **own}, ours


def _chatglm(config: dict[str, Any], theirs: Tensors) -> tuple[dict[str, Any], Tensors]:
    """GLM-4-9B in its own form out of ``glm``: q, k and v in one matrix, one below the other."""
    names = {
        "model.embed_tokens": "transformer.embedding.word_embeddings",
        "model.norm": "transformer.encoder.final_layernorm",
        "model.layers": "transformer.encoder.layers",
        "lm_head": "transformer.output_layer",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }
    ours = _renamed(theirs, names)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"transformer.encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = [ours.pop(f"{prefix}self_attn.{one}_proj.{kind}") for one in "qkv"]
            ours[f"{prefix}self_attention.query_key_value.{kind}"] = torch.cat(parts)
    own = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "ffn_hidden_size": config["intermediate_size"],
        "hidden_size": config["hidden_size"],
        "kv_channels": config["head_dim"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "multi_query_attention": True,
        "multi_query_group_num": config["num_key_value_heads"],
        "num_attention_heads": config["num_attention_heads"],
        "num_layers": config["num_hidden_layers"],
        "padded_vocab_size": config["vocab_size"],
        "rope_ratio": config["rope_parameters"]["rope_theta"] / 10000.0,
        "seq_length": config["max_position_embeddings"],
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    }
    return own, ours


def _minicpm(config: dict[str, Any], theirs: Tensors) -> tuple[dict[str, Any], Tensors]:
    """MiniCPM out of Granite, whose factors are the same ones by other numbers."""
    own = {
        "model_type": "minicpm",
        "architectures": ["MiniCPMForCausalLM"],
        "head_dim": config["head_dim"],
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "scale_emb": config["embedding_multiplier"],
        "scale_depth": config["residual_multiplier"] * config["num_hidden_layers"] ** 0.5,
        "dim_model_base": config["hidden_size"] / config["logits_scaling"],
    }
    return {**_kept(config), **own}, dict(theirs)


TWINS: dict[str, tuple[str, dict[str, Any], Callable[..., tuple[dict[str, Any], Tensors]]]] = {
    "internlm2": ("llama", {}, _internlm2),
    "chatglm": ("glm", {}, _chatglm),
    "minicpm": ("granite", {"attention_multiplier": 8**-0.5}, _minicpm),
}
"""Family → the model of :mod:`tests.support.models` with the same weights, further values of that one's config, and
what makes this one out of it."""


def twin(family: str, theirs: Path, folder: Path) -> Path:
    """Writes the family's form of the other model's Hugging Face folder."""
    config = json.loads((theirs / "config.json").read_text())
    own, tensors = TWINS[family][2](config, load_file(theirs / "model.safetensors"))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**own, "torch_dtype": "float32"}))
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors")
    return folder


def _kept(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in _KEPT}


def _renamed(tensors: Tensors, names: dict[str, str]) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed
