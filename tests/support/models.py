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
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": _ROPE}),
    "llama-tied": ("llama", {"rope_parameters": _ROPE, "tie_word_embeddings": True}),
    "llama-bias": ("llama", {"rope_parameters": _ROPE, "attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {"rope_parameters": _LLAMA3_ROPE}),
    "mistral-window": ("mistral", {"rope_parameters": _ROPE, "sliding_window": 9}),
    "qwen2": ("qwen2", {"rope_parameters": _ROPE, "head_dim": 6}),
    "qwen3": ("qwen3", {"rope_parameters": _ROPE}),
}
"""Name → ``model_type`` and what its configuration has beside :data:`_COMMON`."""


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
    model.save_pretrained(folder)
    return folder


def _draw(name: str, parameter: torch.nn.Parameter) -> None:
    with torch.no_grad():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
        elif parameter.dim() == 1 or "embed_tokens" in name or "lm_head" in name:
            parameter.normal_(0.0, 0.3)
        else:
            parameter.normal_(0.0, 1.3 * parameter.size(1) ** -0.5)
