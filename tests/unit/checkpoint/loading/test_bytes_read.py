"""How many bytes the ranks of a job read in all: each byte of a Hugging Face folder about once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mindspeed_lora.checkpoint.canonical import layer_number, padded_vocab_size, shard_ranges, tensor_rule
from mindspeed_lora.checkpoint.formats.mcore_writer import chunk_tensors
from mindspeed_lora.checkpoint.source import Source, open_source
from mindspeed_lora.config.stages import LayerPlacement


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose row-parallel matrices have shards of a few kilobytes a row at TP 8, as those of large models."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=512,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("model")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu").to(torch.float32).save_pretrained(path)
    return path


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes read by ``preadv``, the only way in which tensors are read."""
    total, read = [0], os.preadv

    def counting(*args: object) -> int:
        done = read(*args)  # type: ignore[arg-type]
        total[0] += done
        return done

    monkeypatch.setattr(os, "preadv", counting)
    return total


def read_rank(source: Source, placement: LayerPlacement, tp_rank: int, tp_size: int, pp_rank: int) -> None:
    """What building the model reads on one rank."""
    for chunk in placement.rank_chunks(pp_rank):
        for _, name, full in chunk_tensors(source.shape, chunk):
            rule = tensor_rule(name)
            size = full[rule.axis or 0]
            if name.startswith(("embedding", "output_layer")):
                size = padded_vocab_size(source.shape, 1, tp_size)
            source.read(name, rule.axis, shard_ranges(rule, size, tp_rank, tp_size))
            assert layer_number(name) in (None, *chunk.layers)


@pytest.mark.parametrize(("tp_size", "pp_size"), [(8, 4), (8, 1), (2, 4), (1, 4)])
def test_a_job_reads_each_byte_once(folder: Path, count: list[int], tp_size: int, pp_size: int):
    source = open_source(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    count[0] = 0
    placement = LayerPlacement.even(4, pp_size)
    for pp_rank in range(pp_size):
        for tp_rank in range(tp_size):
            read_rank(source, placement, tp_rank, tp_size, pp_rank)
    print(f"TP {tp_size} x PP {pp_size}: {count[0]} bytes read of {size}")
    assert 0.99 * size < count[0] < 1.01 * size


def test_one_slice_does_not_read_the_others(folder: Path, count: list[int]):
    source = open_source(folder)
    for name, axis in (("mlp.linear_fc2", 1), ("mlp.linear_fc1", 0), ("self_attention.linear_qkv", 0)):
        count[0] = 0
        whole = source.read(f"decoder.layers.3.{name}.weight")
        assert count[0] == whole.numel() * 4
        count[0] = 0
        rule = tensor_rule(f"decoder.layers.3.{name}.weight")
        part = source.read(
            f"decoder.layers.3.{name}.weight", axis, shard_ranges(rule, whole.shape[axis], 5, 8)
        )
        assert count[0] == part.numel() * 4 == whole.numel() // 2
