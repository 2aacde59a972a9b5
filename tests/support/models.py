"""Tiny models of each family as Hugging Face folders, with weights at which every mistake shows.

transformers starts norms at 1, biases at 0 and matrices so small that attention is nearly uniform. Here norms
and biases are random and matrices larger, so that a swapped norm, a lost bias or a wrong position changes the
logits far beyond rounding. The vocabulary divides by no TP size; query heads are wider than ``hidden / heads``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 131
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
}
"""With bands of frequencies that are kept, blended and scaled."""
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.3, 2.0],
    "long_factor": [1.5, 3.0, 9.0],
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 8,
    "q_lora_rank": 20,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 4,
}
"""Multi-latent attention in every layer, and experts in none."""
_DEEPSEEK_MOE = {
    "first_k_dense_replace": 0,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 1.2,
}
"""The published factors, 2.5 and 16, are for trained weights: with random ones they only make rounding grow."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": _ROPE}),
    "llama-tied": ("llama", {"rope_parameters": _ROPE, "tie_word_embeddings": True}),
    "llama-bias": ("llama", {"rope_parameters": _ROPE, "attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {"rope_parameters": _LLAMA3_ROPE}),
    "mistral-window": ("mistral", {"rope_parameters": _ROPE, "sliding_window": 9}),
    "qwen2": ("qwen2", {"rope_parameters": _ROPE, "head_dim": 6}),
    "qwen3": ("qwen3", {"rope_parameters": _ROPE}),
    "mixtral": ("mixtral", {"rope_parameters": _ROPE, "intermediate_size": 24, **_MIXTRAL}),
    "qwen2-moe": (
        "qwen2_moe",
        {"rope_parameters": _ROPE, **_QWEN_MOE, "shared_expert_intermediate_size": 56},
    ),
    "qwen3-moe": (
        "qwen3_moe",
        # PEFT takes a dense layer's gate_proj for an older form of the experts.
        {"rope_parameters": _ROPE, **_QWEN_MOE, "mlp_only_layers": [], "norm_topk_prob": True},
    ),
    "qwen2-yarn": ("qwen2", {"rope_parameters": _YARN_ROPE}),
    "deepseek-v2": ("deepseek_v2", {"rope_parameters": _ROPE, **_LATENT, "q_lora_rank": None}),
    "deepseek-v3": (
        "deepseek_v3",
        {"rope_parameters": {**_YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 0.9}, **_LATENT},
    ),
    "deepseek-v2-moe": (
        "deepseek_v2",
        {
            "rope_parameters": _ROPE,
            **_LATENT,
            **_DEEPSEEK_MOE,
            "topk_method": "group_limited_greedy",
            "n_shared_experts": 2,
        },
    ),
    "deepseek-v3-moe": ("deepseek_v3", {"rope_parameters": _YARN_ROPE, **_LATENT, **_DEEPSEEK_MOE}),
    "glm4-moe": (
        "glm4_moe",
        {
            "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5},
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "n_group": 2,
            "topk_group": 1,
            "use_qk_norm": True,
            "attention_bias": True,
            "routed_scaling_factor": 1.5,
            "norm_topk_prob": True,
        },
    ),
    "phi4-mini": (
        "phi3",
        {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.75}, "pad_token_id": None},
    ),
    "phi3": ("phi3", {"rope_parameters": _ROPE, "sliding_window": 30, "pad_token_id": None}),
    "phi3-longrope": (
        "phi3",
        {
            "rope_parameters": _LONGROPE,
            "original_max_position_embeddings": 24,
            "head_dim": 6,
            "sliding_window": 30,
            "pad_token_id": None,
        },
    ),
    "gemma": ("gemma", {"rope_parameters": _ROPE, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {
            "rope_parameters": _ROPE,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 11,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
            "sliding_window": 9,
        },
    ),
    "glm": (
        "glm",
        {
            "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5},
            "attention_bias": True,
            "pad_token_id": None,
        },
    ),
    "glm4": (
        "glm4",
        {
            "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5},
            "attention_bias": True,
            "pad_token_id": None,
        },
    ),
    "granite": (
        "granite",
        {
            "rope_parameters": _ROPE,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.3,
            "logits_scaling": 1.5,
        },
    ),
}
"""Name → ``model_type`` and what its configuration has beside :data:`_COMMON`."""

EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe", "glm4-moe")
"""Those with experts."""


def make_model(name: str, folder: Path, seed: int = 7, **others: Any) -> Path:
    """Writes the model of that name, with weights drawn from the seed; ``others`` are further values of its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, own = MODELS[name]
    config = AutoConfig.for_model(model_type, **{**_COMMON, **own, **others})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter_name, parameter in model.named_parameters():
            _draw(parameter_name, parameter)
            if model_type.startswith("gemma") and "norm" in parameter_name:
                # Its norms count from 1: with others' weights each layer would enlarge every rounding.
                parameter.data -= 1.0
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    return folder


def _draw(name: str, parameter: torch.nn.Parameter) -> None:
    with torch.no_grad():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
        elif parameter.dim() == 1 or "embed_tokens" in name or "lm_head" in name:
            parameter.normal_(0.0, 0.3)
        else:
            parameter.normal_(0.0, 1.3 * parameter.size(-1) ** -0.5)
