"""A tiny model of every family with experts, built by transformers with a seed and saved as it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

HIDDEN, FFN, WIDTH, LAYERS, HEADS, GROUPS, EXPERTS = 32, 48, 24, 4, 8, 4, 4
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "vocab_size": 51,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.02,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "beta_fast": 24,
    "beta_slow": 1,
    "original_max_position_embeddings": 16,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": EXPERTS, "intermediate_size": WIDTH}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": EXPERTS,
            "moe_intermediate_size": WIDTH,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [2],
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": EXPERTS,
            "moe_intermediate_size": WIDTH,
            "head_dim": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": WIDTH,
            "n_shared_experts": 2,
            "head_dim": 8,
            "use_qk_norm": True,
            "attention_bias": True,
            "first_k_dense_replace": 2,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 1.5,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": WIDTH,
            "n_shared_experts": 1,
            "num_key_value_heads": HEADS,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            **LATENT,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": WIDTH,
            "n_shared_experts": 1,
            "num_key_value_heads": HEADS,
            "first_k_dense_replace": 2,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 16,
            "rope_parameters": YARN,
            **LATENT,
        },
    ),
}
"""Kind → class in transformers and what its configuration has beside :data:`SIZES`."""


def moe_model(
    kind: str, folder: Path, dtype: torch.dtype = torch.float32, *, stacked: bool = False, **changes: Any
) -> Path:
    """Build and save a model whose parameters and buffers are all random.

    ``stacked`` saves it under transformers' names in memory; ``changes`` are of the configuration.
    """
    import transformers

    name, extra = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **extra, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.normal_(std=0.2)
    model.to(dtype).save_pretrained(folder, save_original_format=not stacked)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return folder
