from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_lora.checkpoint.canonical import shard_ranges, tensor_rule
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


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_names_for_peft(name):
    family = FAMILIES[name]
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


class Store:
    """Tensors by name, read as a file would be."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def read_into(self, out: torch.Tensor, name: str, region: tuple[tuple[int, int], ...]) -> None:
        out.copy_(self.tensors[name][tuple(slice(*bounds) for bounds in region)])


HEADS = st.builds(
    lambda groups, rep, head, tp: dataclasses.replace(
        SHAPE, num_query_groups=groups * tp, num_attention_heads=groups * tp * rep, kv_channels=head
    ),
    *(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.sampled_from([1, 2, 3])),
)


@settings(deadline=None)
@given(shape=HEADS, packed=st.booleans(), tp_size=st.integers(1, 4), columns=st.integers(0, 3))
def test_qkv_of_any_shape(shape: ModelShape, packed: bool, tp_size: int, columns: int):
    """Against the layout written out in torch: heads by group, then a cut of whole groups."""
    groups, head = shape.num_query_groups, shape.kv_channels
    own = (columns,) if columns else ()
    rows = [shape.num_attention_heads * head, groups * head, groups * head]
    q, k, v = (torch.randn(count, *own) for count in rows)
    expected = torch.cat([part.reshape(groups, -1, *own) for part in (q, k, v)], dim=1).flatten(0, 1)
    parts = (torch.cat([q, k, v]),) if packed else (q, k, v)
    names = ("qkv",) if packed else ("q", "k", "v")
    check(QKV("c.linear_qkv.weight", names), shape, expected, parts)
    if groups % tp_size == 0:
        grouped = [part.reshape(groups, -1, *own).chunk(tp_size) for part in (q, k, v)]
        for rank in range(tp_size):
            local = torch.cat([part[rank] for part in grouped], dim=1).flatten(0, 1)
            check_shard(QKV("c.linear_qkv.weight", names), shape, parts, (rank, tp_size), local)


@settings(deadline=None)
@given(width=st.integers(1, 6), tp_size=st.integers(1, 4), packed=st.booleans(), columns=st.integers(0, 3))
def test_gate_up_of_any_shape(width: int, tp_size: int, packed: bool, columns: int):
    own = (columns,) if columns else ()
    gate, up = (torch.randn(width * tp_size, *own) for _ in range(2))
    parts = (torch.cat([gate, up]),) if packed else (gate, up)
    mapping = GateUp("c.linear_fc1.weight", ("gate_up",) if packed else ("gate", "up"))
    check(mapping, SHAPE, torch.cat([gate, up]), parts)
    for rank in range(tp_size):
        local = torch.cat([gate.chunk(tp_size)[rank], up.chunk(tp_size)[rank]])
        check_shard(mapping, SHAPE, parts, (rank, tp_size), local)


def check(mapping, shape: ModelShape, whole: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> None:
    assert torch.equal(mapping.join(shape, parts), whole)
    again = mapping.split(shape, whole)
    assert len(again) == len(parts)
    assert all(torch.equal(one, two) for one, two in zip(again, parts, strict=True))
    assert mapping.hf_shapes(shape, whole.shape) == tuple(tuple(part.shape) for part in parts)


def check_shard(mapping, shape: ModelShape, parts, rank: tuple[int, int], local: torch.Tensor) -> None:
    """The ranges that a TP rank reads are its slice of the whole."""
    rows = sum(part.shape[0] for part in parts)
    ranges = shard_ranges(tensor_rule(f"decoder.layers.0.mlp.{mapping.canonical[2:]}"), rows, *rank)
    wanted = [ranges, *([(0, size)] for size in parts[0].shape[1:])]
    out = torch.empty_like(local)
    mapping.read(Store(dict(zip(mapping.hf, parts, strict=True))), shape, rows, None, out, wanted)
    assert torch.equal(out, local)


def test_a_table_carries_experts_and_latent_attention():
    """Rows of a DeepSeek-like model: nothing in the mechanism is of dense layers only."""
    layer, hf = "decoder.layers.{layer}", "model.layers.{layer}"
    experts = f"{layer}.mlp.experts.local_experts.{{expert}}"
    family = dataclasses.replace(
        FAMILIES["llama"],
        table=(
            *FAMILIES["llama"].table,
            GateUp(
                f"{experts}.linear_fc1.weight",
                tuple(f"{hf}.mlp.experts.{{expert}}.{name}_proj.weight" for name in ("gate", "up")),
            ),
            Direct(f"{experts}.linear_fc2.weight", (f"{hf}.mlp.experts.{{expert}}.down_proj.weight",)),
            Direct(f"{layer}.mlp.router.weight", (f"{hf}.mlp.gate.weight",)),
            GateUp(
                f"{layer}.mlp.shared_experts.linear_fc1.weight",
                tuple(f"{hf}.mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up")),
            ),
            Direct(
                f"{layer}.self_attention.linear_kv_down_proj.weight",
                (f"{hf}.self_attn.kv_a_proj_with_mqa.weight",),
            ),
        ),
    )

    def names(canonical: str) -> tuple[str, ...]:
        mapping, number = family.mapping(canonical)
        return mapping.names(number)

    assert names("decoder.layers.3.mlp.experts.local_experts.41.linear_fc1.weight") == (
        "model.layers.3.mlp.experts.41.gate_proj.weight",
        "model.layers.3.mlp.experts.41.up_proj.weight",
    )
    mapping, number = family.mapping("decoder.layers.3.mlp.experts.local_experts.0.linear_fc2.weight")
    assert mapping.modules(number) == ("model.layers.3.mlp.experts.0.down_proj",)
    assert mapping.targets == ("down_proj",)
    assert names("decoder.layers.12.mlp.router.weight") == ("model.layers.12.mlp.gate.weight",)
    assert len(names("decoder.layers.1.mlp.shared_experts.linear_fc1.weight")) == 2
    assert names("decoder.layers.1.self_attention.linear_kv_down_proj.weight") == (
        "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
    )
