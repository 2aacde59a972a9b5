from __future__ import annotations

import pytest
import torch

from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.models.families import FAMILIES
from mindspeed_lora.models.families.mapping import QKV, Direct, GateUp

SHAPE = ModelShape(
    family="llama",
    num_layers=1,
    hidden_size=6,
    ffn_hidden_size=8,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=2,
    vocab_size=9,
    max_position_embeddings=8,
)


def test_qkv_interleaves_by_query_group():
    mapping = QKV("c", ("q", "k", "v"))
    parts = (torch.arange(12), torch.arange(100, 104), torch.arange(200, 204))
    whole = mapping.join(SHAPE, parts)
    assert whole.tolist() == [*range(6), 100, 101, 200, 201, *range(6, 12), 102, 103, 202, 203]
    for part, again in zip(parts, mapping.split(SHAPE, whole), strict=True):
        assert torch.equal(part, again)
    assert mapping.hf_shapes(SHAPE, (20, 6)) == ((12, 6), (4, 6), (4, 6))


def test_gate_lies_above_up():
    mapping = GateUp("c", ("gate", "up"))
    gate, up = torch.ones(8, 6), torch.zeros(8, 6)
    whole = mapping.join(SHAPE, (gate, up))
    assert whole[:8].all() and not whole[8:].any()
    assert torch.equal(mapping.split(SHAPE, whole)[1], up)


def test_direct_changes_nothing():
    tensor = torch.randn(3, 2)
    mapping = Direct("c", ("h",))
    assert mapping.split(SHAPE, tensor)[0] is tensor
    assert mapping.join(SHAPE, [tensor]) is tensor


@pytest.mark.parametrize("family", list(FAMILIES.values()), ids=list(FAMILIES))
def test_names_for_peft(family):
    mapping, layer = family.mapping("decoder.layers.12.self_attention.linear_qkv.weight")
    assert layer == 12
    assert mapping.modules(layer) == tuple(f"model.layers.12.self_attn.{name}_proj" for name in "qkv")
    assert mapping.targets == ("q_proj", "k_proj", "v_proj")
    mapping, layer = family.mapping("decoder.layers.0.mlp.linear_fc2.weight")
    assert mapping.modules(layer) == ("model.layers.0.mlp.down_proj",)
    mapping, layer = family.mapping("output_layer.weight")
    assert (mapping.names(layer), layer) == (("lm_head.weight",), None)


def test_a_name_without_mapping():
    with pytest.raises(KeyError):
        FAMILIES["llama"].mapping("decoder.layers.0.self_attention.q_layernorm.weight")
