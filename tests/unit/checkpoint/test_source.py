"""Hugging Face → canonical → slices of any TP → Hugging Face, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_lora.checkpoint.canonical import (
    EMBEDDING,
    VOCABULARY_TENSORS,
    padded_vocab_size,
    shard_ranges,
    tensor_rule,
)
from mindspeed_lora.checkpoint.formats.hf import HfSource
from mindspeed_lora.checkpoint.source import Source, open_source
from mindspeed_lora.errors import Refused


def shards(source: Source, name: str, size: int, tp_size: int) -> list[torch.Tensor]:
    rule = tensor_rule(name)
    return [source.read(name, rule.axis, shard_ranges(rule, size, rank, tp_size)) for rank in range(tp_size)]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_slices_reassemble_to_the_hugging_face_tensors(model, tp_size: int):
    source = open_source(model.path)
    assert isinstance(source, HfSource)
    expected, seen = model.tensors, set()
    for name, full in source.tensors.items():
        rule = tensor_rule(name)
        if rule.axis is None:
            whole = source.read(name)
        else:
            size = full[rule.axis]
            if name in VOCABULARY_TENSORS:
                size = padded_vocab_size(source.shape, 1, tp_size)
            parts = shards(source, name, size, tp_size)
            blocks = [part.chunk(rule.blocks, rule.axis) for part in parts]
            whole = torch.cat([part[b] for b in range(rule.blocks) for part in blocks], rule.axis)
            assert not whole[full[0] :].any()
            whole = whole[: full[0]]
        mapping, layer = source.family.mapping(name)
        for hf_name, part in zip(mapping.names(layer), mapping.split(source.shape, whole), strict=True):
            assert part.dtype == expected[hf_name].dtype
            assert torch.equal(part, expected[hf_name]), hf_name
            seen.add(hf_name)
    assert seen == set(expected)


def test_fused_matrices_have_megatrons_order(models):
    model = models("llama-biased")
    source, tensors = open_source(model.path), model.tensors
    layer = "model.layers.2"
    for kind in ("weight", "bias"):
        q, k, v = (tensors[f"{layer}.self_attn.{name}_proj.{kind}"] for name in "qkv")
        groups = [(q[8 * g : 8 * g + 8], k[4 * g : 4 * g + 4], v[4 * g : 4 * g + 4]) for g in range(4)]
        qkv = torch.cat([part for group in groups for part in group])
        assert torch.equal(source.read(f"decoder.layers.2.self_attention.linear_qkv.{kind}"), qkv)
        gate, up = (tensors[f"{layer}.mlp.{name}_proj.{kind}"] for name in ("gate", "up"))
        assert torch.equal(source.read(f"decoder.layers.2.mlp.linear_fc1.{kind}"), torch.cat([gate, up]))


def test_tp_shard_of_fc1_is_its_gate_above_its_up(models):
    model = models("llama")
    source = open_source(model.path)
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    gate, up = (model.tensors[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    assert torch.equal(shards(source, name, 96, 2)[1], torch.cat([gate[24:], up[24:]]))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_ranges_are_those_of_the_whole(models, data):
    source = open_source(models("qwen3-tied").path)
    name = data.draw(st.sampled_from(source.names()))
    whole = source.read(name)
    axis = data.draw(st.integers(0, whole.dim() - 1))
    bound = st.integers(0, whole.shape[axis])
    ranges = [tuple(sorted(pair)) for pair in data.draw(st.lists(st.tuples(bound, bound), min_size=1))]
    expected = torch.cat([whole.narrow(axis, a, b - a) for a, b in ranges], axis)
    assert torch.equal(source.read(name, axis, ranges), expected)


def test_rows_past_the_vocabulary_are_zero(models):
    model = models("llama")
    rows = open_source(model.path).read(EMBEDDING, 0, [(99, 104), (103, 104)])
    assert rows.shape == (6, 32)
    assert torch.equal(rows[:2], model.tensors["model.embed_tokens.weight"][99:])
    assert not rows[2:].any()


def test_origin_of_a_folder_in_the_hubs_cache(own_model, tmp_path: Path):
    snapshot = tmp_path / "models--meta-llama--Llama-2-7b-hf" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    own_model.path.rename(snapshot)
    source = open_source(snapshot)
    assert source.hf_origin == "meta-llama/Llama-2-7b-hf"
    assert source.origin is not None and source.origin.revision == "0123abc"


def test_what_is_no_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(Refused, match="no such folder"):
        open_source(tmp_path / "absent")
    with pytest.raises(Refused, match="neither a Hugging Face model"):
        open_source(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="is a file"):
        open_source(tmp_path / "file")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(Refused, match="holds an adapter only; give it to --lora-load"):
        open_source(tmp_path)
