"""Experts in Hugging Face folders: one by one and stacked, read and written bit by bit."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_lora.checkpoint.engine import execute
from mindspeed_lora.checkpoint.formats.hf import HfSource
from mindspeed_lora.checkpoint.formats.hf_writer import plan_hf, plan_shards
from mindspeed_lora.checkpoint.source import open_source
from mindspeed_lora.config.shape import ModelShape, MoEShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES
from tests.support.moe_models import EXPERTS, HIDDEN, KINDS, WIDTH, moe_model

EXPERT = "decoder.layers.3.mlp.experts.local_experts"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def written(source: Path, target: Path) -> dict[str, torch.Tensor]:
    """The tensors that reading a folder by canonical names and writing it again gives."""
    target.mkdir()
    execute(plan_hf(HfSource(source), source), target)
    return weights(target)


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_back_to_the_same_bits(kind: str, tmp_path: Path):
    dtype = torch.bfloat16 if kind == "qwen3_moe" else torch.float32
    folder = moe_model(kind, tmp_path / "model", dtype)
    assert_same_bits(written(folder, tmp_path / "again"), weights(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_files_hold_the_same_model(kind: str, tmp_path: Path):
    """What is written has the names of transformers' files, whatever was read."""
    folder = moe_model(kind, tmp_path / "stacked", stacked=True)
    assert weights(folder)["model.layers.3.mlp.experts.gate_up_proj"].shape == (EXPERTS, 2 * WIDTH, HIDDEN)
    plain = moe_model(kind, tmp_path / "plain")
    assert_same_bits(written(folder, tmp_path / "again"), weights(plain))
    source = open_source(folder)
    rows = [(3, 9), (WIDTH + 3, WIDTH + 9)]
    name = f"{EXPERT}.2.linear_fc1.weight"
    assert torch.equal(source.read(name, 0, rows), torch.cat([source.read(name)[a:b] for a, b in rows]))


def test_stacked_experts_of_a_pickled_file(tmp_path: Path):
    folder = moe_model("qwen3_moe", tmp_path / "model", stacked=True)
    tensors = weights(folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = open_source(folder).read(f"{EXPERT}.1.linear_fc2.weight")
    assert torch.equal(found, tensors["model.layers.3.mlp.experts.down_proj"][1])


def test_a_stacked_expert_is_read_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mindspeed_lora.checkpoint.storage import safetensors_file

    source = open_source(moe_model("mixtral", tmp_path / "model", stacked=True))
    read: list[int] = []
    original = safetensors_file._read_bytes

    def counted(file: int, buffer: memoryview, offset: int, path: Path) -> None:
        read.append(len(buffer))
        original(file, buffer, offset, path)

    monkeypatch.setattr(safetensors_file, "_read_bytes", counted)
    source.read(f"{EXPERT}.1.linear_fc1.weight")
    assert sum(read) == 2 * WIDTH * HIDDEN * 4


def test_places_of_the_experts(tmp_path: Path):
    folder = moe_model("mixtral", tmp_path / "mixtral")
    source, tensors = open_source(folder), weights(folder)
    expert = "model.layers.3.block_sparse_moe.experts.2"
    gate_up = torch.cat([tensors[f"{expert}.w1.weight"], tensors[f"{expert}.w3.weight"]])
    assert torch.equal(source.read(f"{EXPERT}.2.linear_fc1.weight"), gate_up)
    assert torch.equal(source.read(f"{EXPERT}.2.linear_fc2.weight"), tensors[f"{expert}.w2.weight"])
    router = source.read("decoder.layers.3.mlp.router.weight")
    assert torch.equal(router, tensors["model.layers.3.block_sparse_moe.gate.weight"])

    folder = moe_model("qwen2_moe", tmp_path / "qwen2_moe")
    source, tensors = open_source(folder), weights(folder)
    gate = source.read("decoder.layers.1.mlp.shared_experts.gate_weight")
    assert torch.equal(gate, tensors["model.layers.1.mlp.shared_expert_gate.weight"])

    folder = moe_model("glm4_moe", tmp_path / "glm4_moe")
    source, tensors = open_source(folder), weights(folder)
    bias = source.read("decoder.layers.2.mlp.router.expert_bias")
    assert torch.equal(bias, tensors["model.layers.2.mlp.gate.e_score_correction_bias"])
    shared = [tensors[f"model.layers.2.mlp.shared_experts.{one}_proj.weight"] for one in ("gate", "up")]
    assert torch.equal(
        source.read("decoder.layers.2.mlp.shared_experts.linear_fc1.weight"), torch.cat(shared)
    )


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path):
    folder = moe_model("glm4_moe", tmp_path / "model")
    tensors = weights(folder)
    further = {name.replace("layers.3.", "layers.4."): one.clone() for name, one in tensors.items()}
    further["model.layers.4.eh_proj.weight"] = torch.zeros(HIDDEN, 2 * HIDDEN)
    save_file({**tensors, **further}, folder / "model.safetensors")
    assert_same_bits(written(folder, tmp_path / "again"), tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    with pytest.raises(Refused, match=r"are not known in a glm4_moe model.*layers\.4\."):
        open_source(folder)


def test_stacked_tensor_of_another_shape(tmp_path: Path):
    folder = moe_model("qwen3_moe", tmp_path / "model", stacked=True)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensors = weights(folder)
    save_file({**tensors, name: tensors[name].transpose(1, 2).contiguous()}, folder / "model.safetensors")
    with pytest.raises(Refused, match=r"gate_up_proj has shape \[4, 32, 48\], but .* means \[4, 48, 32\]"):
        open_source(folder)


def test_one_expert_is_missing(tmp_path: Path):
    folder = moe_model("mixtral", tmp_path / "model")
    tensors = weights(folder)
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(Refused, match=r"missing from the weight files: model\.layers\.1\.block_sparse_moe"):
        open_source(folder)


class _Shapes:
    """A source of names alone."""

    def __init__(self, shape: ModelShape) -> None:
        from mindspeed_lora.checkpoint.canonical import canonical_tensors

        self.shape, self.tensors = shape, canonical_tensors(shape)
        self.quantization = None

    def names(self) -> list[str]:
        return list(self.tensors)

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def is_quantized(self, name: str) -> bool:
        return False


def test_planning_grows_with_the_number_of_tensors():
    """DeepSeek-V3's number of experts and layers: 30,000 tensors are planned in seconds, not hours."""
    shape = ModelShape(
        family="qwen3_moe",
        num_layers=61,
        hidden_size=64,
        ffn_hidden_size=64,
        num_attention_heads=8,
        num_query_groups=8,
        kv_channels=8,
        vocab_size=1000,
        max_position_embeddings=64,
        qk_layernorm=True,
        moe=MoEShape(num_experts=256, topk=8, ffn_hidden_size=32),
    )
    start = time.process_time()
    shards = plan_shards(_Shapes(shape), FAMILIES["qwen3_moe"], 5_000_000)  # type: ignore[arg-type]
    assert sum(map(len, shards)) > 31_000
    assert time.process_time() - start < 10
