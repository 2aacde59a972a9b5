"""The layer of experts against the blocks of transformers' own models: outputs and input gradients in float32."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from megatron.core.transformer import TransformerConfig

from mindspeed_lora.config.shape import MoEShape
from mindspeed_lora.models.moe.layer import MoELayer
from mindspeed_lora.parallel.groups import ParallelGroups

HIDDEN, INNER = 24, 12
COMMON = {
    "vocab_size": 40,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
DEEPSEEK = {
    "first_k_dense_replace": 0,
    "moe_intermediate_size": INNER,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}
EIGHT = MoEShape(num_experts=8, topk=3, ffn_hidden_size=INNER)
SIGMOID = dataclasses.replace(
    EIGHT,
    shared_ffn_hidden_size=2 * INNER,
    score_function="sigmoid",
    expert_bias=True,
    num_groups=4,
    group_topk=2,
    group_score="top2",
    scaling_factor=2.5,
)
BLOCKS: dict[str, tuple[str, dict[str, Any], MoEShape]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 3}, EIGHT),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": INNER,
            "shared_expert_intermediate_size": 20,
            "norm_topk_prob": False,
        },
        dataclasses.replace(EIGHT, normalise=False, shared_ffn_hidden_size=20, shared_expert_gate=True),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": INNER, "norm_topk_prob": True},
        EIGHT,
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {**DEEPSEEK, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
        dataclasses.replace(
            EIGHT,
            normalise=False,
            shared_ffn_hidden_size=2 * INNER,
            num_groups=4,
            group_topk=2,
            scaling_factor=1.5,
        ),
    ),
    "deepseek_v3": ("DeepseekV3", {**DEEPSEEK, "routed_scaling_factor": 2.5}, SIGMOID),
    "glm4_moe": (
        "Glm4Moe",
        {**DEEPSEEK, "routed_scaling_factor": 2.5, "head_dim": 12, "norm_topk_prob": True},
        SIGMOID,
    ),
}


def their_block(prefix: str, options: dict[str, Any]) -> torch.nn.Module:
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **options})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).float().train()
    block: torch.nn.Module = model.model.layers[0].mlp.requires_grad_(False)
    generator = torch.Generator().manual_seed(4)
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        # A router that starts at zero, as some do, would choose the same experts for all tokens.
        size = 0.3 if "bias" in name else 1.0 if name.startswith("gate.") else 0.2
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * size)
    return block


def our_layer(block: Any, moe: MoEShape, groups: ParallelGroups) -> MoELayer:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
    )
    with torch.device("meta"):
        layer = MoELayer(config, moe, groups)
    layer = layer.to_empty(device="cpu").requires_grad_(False)
    layer.router.weight.copy_(block.gate.weight)
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.copy_(block.gate.e_score_correction_bias)
    layer.experts.linear_fc1.weight.copy_(block.experts.gate_up_proj)
    layer.experts.linear_fc2.weight.copy_(block.experts.down_proj)
    if layer.shared_experts is not None:
        theirs = getattr(block, "shared_experts", None) or block.shared_expert
        fused = torch.cat([theirs.gate_proj.weight, theirs.up_proj.weight])
        layer.shared_experts.linear_fc1.weight.copy_(fused)
        layer.shared_experts.linear_fc2.weight.copy_(theirs.down_proj.weight)
        if layer.shared_experts.gate_weight is not None:
            layer.shared_experts.gate_weight.copy_(block.shared_expert_gate.weight)
    return layer


@pytest.mark.parametrize("family", BLOCKS)
def test_block_of_transformers(groups: ParallelGroups, family: str) -> None:
    prefix, options, moe = BLOCKS[family]
    block = their_block(prefix, options)
    layer = our_layer(block, moe, groups)
    generator = torch.Generator().manual_seed(5)
    x, grad = (torch.randn(7, 3, HIDDEN, generator=generator) for _ in range(2))
    theirs_x, ours_x = x.transpose(0, 1).contiguous().requires_grad_(), x.clone().requires_grad_()
    theirs = block(theirs_x).transpose(0, 1)
    (theirs * grad).sum().backward()
    ours, bias = layer(ours_x)
    (ours * grad).sum().backward()
    assert bias is None
    # Sums of some dozens of terms of size 1 in float32, in another order.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours_x.grad, theirs_x.grad.transpose(0, 1), rtol=1e-5, atol=2e-5)
