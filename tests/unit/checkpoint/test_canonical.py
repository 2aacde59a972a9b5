from __future__ import annotations

import dataclasses

import pytest

from mindspeed_lora.checkpoint.canonical import (
    TensorRule,
    adapter_linears,
    canonical_tensors,
    expert_number,
    layer_number,
    padded_vocab_size,
    shard_ranges,
    tensor_rule,
    to_canonical,
    to_local,
)
from mindspeed_lora.config.shape import MLAShape, ModelShape, MoEShape

SHAPE = ModelShape(
    family="qwen2",
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=11,
    max_position_embeddings=32,
    add_qkv_bias=True,
    qk_layernorm=True,
)


def test_names_and_shapes_of_a_model():
    tensors = canonical_tensors(SHAPE)
    assert tensors["embedding.word_embeddings.weight"] == (11, 16)
    assert tensors["decoder.layers.1.self_attention.linear_qkv.weight"] == ((4 + 2 * 2) * 8, 16)
    assert tensors["decoder.layers.1.self_attention.linear_qkv.bias"] == (64,)
    assert tensors["decoder.layers.0.self_attention.linear_proj.weight"] == (16, 32)
    assert tensors["decoder.layers.0.self_attention.q_layernorm.weight"] == (8,)
    assert tensors["decoder.layers.0.mlp.linear_fc1.weight"] == (48, 16)
    assert tensors["decoder.layers.0.mlp.linear_fc2.weight"] == (16, 24)
    assert tensors["output_layer.weight"] == (11, 16)
    assert "decoder.layers.0.self_attention.linear_proj.bias" not in tensors
    assert list(tensors)[0] == "embedding.word_embeddings.weight"


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("embedding.word_embeddings.weight", TensorRule(0)),
        ("output_layer.weight", TensorRule(0)),
        ("decoder.layers.3.self_attention.linear_qkv.bias", TensorRule(0)),
        ("decoder.layers.3.mlp.linear_fc1.weight", TensorRule(0, 2)),
        ("decoder.layers.3.mlp.linear_fc1.bias", TensorRule(0, 2)),
        ("decoder.layers.3.mlp.linear_fc2.weight", TensorRule(1)),
        ("decoder.layers.3.mlp.linear_fc2.bias", TensorRule(None)),
        ("decoder.layers.3.self_attention.linear_proj.weight", TensorRule(1)),
        ("decoder.layers.3.self_attention.q_layernorm.weight", TensorRule(None)),
        ("decoder.final_layernorm.weight", TensorRule(None)),
        ("decoder.layers.3.mlp.linear_fc1.lora_a", TensorRule(None)),
        ("decoder.layers.3.mlp.linear_fc1.lora_b", TensorRule(0, 2)),
        ("decoder.layers.3.self_attention.linear_proj.lora_a", TensorRule(1)),
        ("decoder.layers.3.self_attention.linear_proj.lora_b", TensorRule(None)),
    ],
)
def test_rules(name: str, rule: TensorRule):
    assert tensor_rule(name) == rule


def test_every_tensor_of_a_model_has_a_rule():
    for name in canonical_tensors(SHAPE):
        tensor_rule(name)


def test_stacked_blocks_are_cut_one_by_one():
    assert shard_ranges(TensorRule(0, 2), 16, 1, 4) == [(2, 4), (10, 12)]
    assert shard_ranges(TensorRule(0), 16, 1, 4) == [(4, 8)]
    assert shard_ranges(TensorRule(None), 16, 1, 4) == [(0, 16)]


def test_sizes_that_do_not_divide_are_an_error():
    with pytest.raises(ValueError, match="size 10 does not divide into 2 blocks over 2"):
        shard_ranges(TensorRule(0, 2), 10, 0, 2)


def test_padded_vocabulary():
    assert padded_vocab_size(SHAPE, 1, 1) == 11
    assert padded_vocab_size(SHAPE, 1, 4) == 12
    assert padded_vocab_size(SHAPE, 8, 2) == 16


def test_local_names():
    slots = (4, None, 5)
    local = "module.module.decoder.layers.2.mlp.linear_fc1.base_layer.weight"
    assert to_canonical(local, slots) == "decoder.layers.5.mlp.linear_fc1.weight"
    assert to_canonical("embedding.word_embeddings.weight", slots) == "embedding.word_embeddings.weight"
    assert (
        to_local("decoder.layers.5.mlp.linear_fc1.weight", slots) == "decoder.layers.2.mlp.linear_fc1.weight"
    )
    assert to_local("output_layer.weight", slots) == "output_layer.weight"
    assert layer_number(local) == 2
    assert layer_number("output_layer.weight") is None


def test_linears_that_take_adapters():
    linears = adapter_linears(SHAPE)
    assert list(linears)[:2] == [
        "decoder.layers.0.self_attention.linear_qkv",
        "decoder.layers.0.self_attention.linear_proj",
    ]
    assert linears["decoder.layers.1.mlp.linear_fc1"] == (48, 16)
    assert len(linears) == 8


MOE = dataclasses.replace(
    SHAPE,
    add_qkv_bias=False,
    qk_layernorm=False,
    moe=MoEShape(
        num_experts=3,
        topk=2,
        ffn_hidden_size=5,
        dense_layers=(0,),
        shared_ffn_hidden_size=10,
        shared_expert_gate=True,
        expert_bias=True,
    ),
    mla=MLAShape(q_lora_rank=6, kv_lora_rank=7, qk_head_dim=4, qk_pos_emb_head_dim=2, v_head_dim=3),
)


def test_names_and_shapes_of_experts_and_latent_attention():
    tensors = canonical_tensors(MOE)
    first, second = (
        {name[17:]: size for name, size in tensors.items() if name.startswith(f"decoder.layers.{layer}.")}
        for layer in (0, 1)
    )
    assert first["mlp.linear_fc1.weight"] == (48, 16)
    assert not any("experts" in name or "router" in name for name in first)
    assert "mlp.linear_fc1.weight" not in second
    assert {name: size for name, size in second.items() if name.startswith("mlp.")} == {
        "mlp.router.weight": (3, 16),
        "mlp.router.expert_bias": (3,),
        **{f"mlp.experts.local_experts.{expert}.linear_fc1.weight": (10, 16) for expert in range(3)},
        **{f"mlp.experts.local_experts.{expert}.linear_fc2.weight": (16, 5) for expert in range(3)},
        "mlp.shared_experts.linear_fc1.weight": (20, 16),
        "mlp.shared_experts.linear_fc2.weight": (16, 10),
        "mlp.shared_experts.gate_weight": (1, 16),
    }
    assert {name: size for name, size in second.items() if name.startswith("self_attention.")} == {
        "self_attention.q_layernorm.weight": (6,),
        "self_attention.kv_layernorm.weight": (7,),
        "self_attention.linear_q_down_proj.weight": (6, 16),
        "self_attention.linear_q_up_proj.weight": (4 * 6, 6),
        "self_attention.linear_kv_down_proj.weight": (7 + 2, 16),
        "self_attention.linear_kv_up_proj.weight": (4 * (4 + 3), 7),
        "self_attention.linear_proj.weight": (16, 4 * 3),
    }
    for name in tensors:
        tensor_rule(name)
    assert expert_number("decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight") == 2
    assert expert_number("decoder.layers.1.mlp.linear_fc1.weight") is None


@pytest.mark.parametrize(
    "name, rule",
    [
        ("mlp.experts.local_experts.2.linear_fc1.weight", TensorRule(0, 2)),
        ("mlp.experts.local_experts.2.linear_fc2.lora_a", TensorRule(1)),
        ("mlp.experts.local_experts.2.linear_fc1.gate_proj.lora_b", TensorRule(0)),
        ("mlp.shared_experts.gate_weight", TensorRule(None)),
        ("self_attention.linear_q_down_proj.lora_b", TensorRule(None)),
        ("self_attention.linear_kv_up_proj.lora_a", TensorRule(None)),
        ("self_attention.linear_kv_up_proj.lora_b", TensorRule(0)),
    ],
)
def test_rules_of_experts_and_latent_attention(name, rule):
    assert tensor_rule(f"decoder.layers.1.{name}") == rule
