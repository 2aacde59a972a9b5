"""A tiny model of every family as a Hugging Face folder.

Those that transformers has are built by it. The others' tensors are written here under the names, in the shapes and
with the config.json keys of the published files (InternLM2, Baichuan, ChatGLM: their ``modeling_*.py``), none of which
comes from the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, FFN, LAYERS, HEADS, GROUPS, HEAD, WORDS = 32, 48, 2, 8, 4, 4, 51
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "vocab_size": WORDS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 3.0],
    "original_max_position_embeddings": 32,
}
LLAMA32_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
OF_TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama3.2": ("Llama", "Llama", {"rope_parameters": LLAMA32_ROPE, "tie_word_embeddings": True}),
    "phi3": ("Phi3", "Phi3", {"sliding_window": 16}),
    "phi3-longrope": ("Phi3", "Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "phi4-mini": (
        "Phi3",
        "Phi3",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "tie_word_embeddings": True,
        },
    ),
    "gemma": ("Gemma", "Gemma", {"head_dim": HEAD}),
    "gemma2": ("Gemma2", "Gemma2", {"head_dim": 8}),
    "gemma3": ("Gemma3", "Gemma3Text", {"head_dim": 8, "attention_bias": True}),
    "glm": ("Glm", "Glm", {"head_dim": HEAD}),
    "glm4": ("Glm4", "Glm4", {"head_dim": HEAD, "attention_bias": False}),
    "granite": (
        "Granite",
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.25,
        },
    ),
}
"""Kind → model class, configuration class and what the configuration has beside :data:`SIZES`."""


def _internlm2() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Keys and tensors of internlm2-7b; ``dynamic`` scaling as published."""
    config = {
        **SIZES,
        "model_type": "internlm2",
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
        "bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    tensors: dict[str, tuple[int, ...]] = {
        "model.tok_embeddings.weight": (WORDS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "output.weight": (WORDS, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {
            f"{prefix}attention_norm.weight": (HIDDEN,),
            f"{prefix}attention.wqkv.weight": ((HEADS + 2 * GROUPS) * HEAD, HIDDEN),
            f"{prefix}attention.wo.weight": (HIDDEN, HIDDEN),
            f"{prefix}ffn_norm.weight": (HIDDEN,),
            f"{prefix}feed_forward.w1.weight": (FFN, HIDDEN),
            f"{prefix}feed_forward.w3.weight": (FFN, HIDDEN),
            f"{prefix}feed_forward.w2.weight": (HIDDEN, FFN),
        }
    return config, tensors


def _minicpm() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Keys and tensors of MiniCPM-2B."""
    config = {
        **SIZES,
        "model_type": "minicpm",
        "architectures": ["MiniCPMForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "scale_emb": 12,
        "dim_model_base": 16,
        "scale_depth": 1.4,
    }
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (WORDS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {
            f"{prefix}input_layernorm.weight": (HIDDEN,),
            f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
            f"{prefix}self_attn.k_proj.weight": (GROUPS * HEAD, HIDDEN),
            f"{prefix}self_attn.v_proj.weight": (GROUPS * HEAD, HIDDEN),
            f"{prefix}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}mlp.gate_proj.weight": (FFN, HIDDEN),
            f"{prefix}mlp.up_proj.weight": (FFN, HIDDEN),
            f"{prefix}mlp.down_proj.weight": (HIDDEN, FFN),
        }
    return config, tensors


def _baichuan(**values: Any) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Keys and tensors of the Baichuan models, which have as many key as query heads."""
    config: dict[str, Any] = {
        **{key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM"],
        "hidden_act": "silu",
        "model_max_length": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **values,
    }
    config = {key: value for key, value in config.items() if value is not None}
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (WORDS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (WORDS, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {
            f"{prefix}input_layernorm.weight": (HIDDEN,),
            f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}self_attn.W_pack.weight": (3 * HIDDEN, HIDDEN),
            f"{prefix}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}self_attn.rotary_emb.inv_freq": (HEAD // 2,),
            f"{prefix}mlp.gate_proj.weight": (FFN, HIDDEN),
            f"{prefix}mlp.up_proj.weight": (FFN, HIDDEN),
            f"{prefix}mlp.down_proj.weight": (HIDDEN, FFN),
        }
    return config, tensors


def _chatglm() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Keys and tensors of chatglm3-6b."""
    config = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "ffn_hidden_size": FFN,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": HIDDEN,
        "kv_channels": HEAD,
        "layernorm_epsilon": 1e-05,
        "multi_query_attention": True,
        "multi_query_group_num": GROUPS,
        "num_attention_heads": HEADS,
        "num_layers": LAYERS,
        "original_rope": True,
        "padded_vocab_size": WORDS,
        "post_layer_norm": True,
        "rmsnorm": True,
        "seq_length": 64,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    tensors: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (WORDS, HIDDEN),
        "transformer.rotary_pos_emb.inv_freq": (HEAD // 2,),
        "transformer.encoder.final_layernorm.weight": (HIDDEN,),
        "transformer.output_layer.weight": (WORDS, HIDDEN),
    }
    rows = (HEADS + 2 * GROUPS) * HEAD
    for layer in range(LAYERS):
        prefix = f"transformer.encoder.layers.{layer}."
        tensors |= {
            f"{prefix}input_layernorm.weight": (HIDDEN,),
            f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}self_attention.query_key_value.weight": (rows, HIDDEN),
            f"{prefix}self_attention.query_key_value.bias": (rows,),
            f"{prefix}self_attention.dense.weight": (HIDDEN, HIDDEN),
            f"{prefix}mlp.dense_h_to_4h.weight": (2 * FFN, HIDDEN),
            f"{prefix}mlp.dense_4h_to_h.weight": (HIDDEN, FFN),
        }
    return config, tensors


BY_HAND: dict[str, Callable[[], tuple[dict[str, Any], dict[str, tuple[int, ...]]]]] = {
    "internlm2": _internlm2,
    "minicpm": _minicpm,
    "baichuan-7b": lambda: _baichuan(architectures=["BaiChuanForCausalLM"]),
    "baichuan2-7b": lambda: _baichuan(z_loss_weight=0),
    "baichuan2-13b": lambda: _baichuan(z_loss_weight=0, max_position_embeddings=None),
    "chatglm3": _chatglm,
}
KINDS = (*OF_TRANSFORMERS, *BY_HAND)


def family_model(kind: str, folder: Path, seed: int = 3) -> Path:
    """Write the model of a kind, all its parameters random, and a stand-in for its tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind in OF_TRANSFORMERS:
            _build(kind, folder)
        else:
            _write(kind, folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def _build(kind: str, folder: Path) -> None:
    import transformers

    model_class, config_class, own = OF_TRANSFORMERS[kind]
    config = getattr(transformers, f"{config_class}Config")(**{**SIZES, **own})
    model = getattr(transformers, f"{model_class}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    model.to(torch.float32).save_pretrained(folder)


def _write(kind: str, folder: Path) -> None:
    config, shapes = BY_HAND[kind]()
    dtype = getattr(torch, config["torch_dtype"])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: (torch.randn(size) * 0.2).to(dtype) for name, size in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
