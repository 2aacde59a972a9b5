"""Hugging Face folders and adapters with pickled weights, as transformers and PEFT wrote them by ``torch.save``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.checkpoint.peft.source import AdapterSource
from mindspeed_lora.checkpoint.source import open_source
from mindspeed_lora.errors import Refused
from tests.support.adapters import new_adapter, write

INDEX = "pytorch_model.bin.index.json"


def pickle_weights(
    model: Any, folder: Path, shards: int = 1, zipped: bool = True, **more: torch.Tensor
) -> Path:
    """The model's folder with its weights in ``.bin`` files and, for several, an index."""
    shutil.copytree(model.path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors, weight_map = {**model.tensors, **more}, {}
    names = list(tensors)
    for number in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        own = {name: tensors[name] for name in names[number::shards]}
        torch.save(own, folder / file, _use_new_zipfile_serialization=zipped)
        weight_map.update(dict.fromkeys(own, file))
    if shards > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def assert_same(folder: Path, model: Any) -> None:
    found, expected = open_source(folder), open_source(model.path)
    for name in expected.names():
        assert torch.equal(found.read(name), expected.read(name)), name
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    ranges = [(3, 9), (40, 50)]
    assert torch.equal(found.read(name, 0, ranges), expected.read(name, 0, ranges))


def refusal(folder: Path) -> str:
    with pytest.raises(Refused) as error:
        open_source(folder)
    assert str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights(models: Any, tmp_path: Path, shards: int, zipped: bool):
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    folder = pickle_weights(models("llama"), tmp_path / "bin", shards, zipped, **inv_freq)
    assert_same(folder, models("llama"))


def test_tied_embeddings_as_one_storage_under_two_names(models: Any, tmp_path: Path):
    model = models("llama-tied")
    tensors = model.tensors
    tied = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    folder = pickle_weights(model, tmp_path / "bin", **tied)
    whole = torch.load(folder / "pytorch_model.bin", weights_only=True)
    whole["lm_head.weight"] = whole["model.embed_tokens.weight"]
    torch.save(whole, folder / "pytorch_model.bin")
    assert_same(folder, model)


def test_safetensors_are_preferred(models: Any, tmp_path: Path):
    folder = tmp_path / "both"
    shutil.copytree(models("llama").path, folder)
    (folder / "pytorch_model.bin").write_bytes(b"not to be opened")
    assert_same(folder, models("llama"))


def test_reading_a_slice_does_not_read_the_rest(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import os

    folder = pickle_weights(models("llama"), tmp_path / "bin")
    source, read, real = open_source(folder), [], os.preadv

    def counted(file: int, buffers: Any, offset: int) -> int:
        count = real(file, buffers, offset)
        read.append(count)
        return count

    monkeypatch.setattr(os, "preadv", counted)
    source.read("decoder.layers.1.mlp.linear_fc1.weight", 0, [(0, 6)])
    assert sum(read) == 6 * 32 * 4


def test_a_model_saved_without_its_head(models: Any, tmp_path: Path):
    from transformers import AutoModel

    AutoModel.from_pretrained(models("llama").path).save_pretrained(tmp_path / "bare")
    assert "architectures LlamaModel is not supported" in refusal(tmp_path / "bare")
    shutil.copyfile(models("llama").path / "config.json", tmp_path / "bare" / "config.json")
    message = refusal(tmp_path / "bare")
    assert "holds embed_tokens.weight where model.embed_tokens.weight is expected" in message
    assert "saved without its head" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder, index: index.update({"lm_head.weight": "../x.bin"}), "which is not a file name"),
        (
            lambda folder, index: index.update({"lm_head.weight": "x.safetensors"}),
            "not of the index's own form",
        ),
        (lambda folder, index: index.update({"lm_head.weight": "x.bin"}), "x.bin: the file is missing"),
        (lambda folder, index: index.update(extra="pytorch_model-00001-of-00003.bin"), "extra should be in"),
        (lambda folder, index: index.pop("lm_head.weight"), None),
        (lambda folder, index: (folder / "pytorch_model-00002-of-00003.bin").unlink(), "the file is missing"),
    ],
)
def test_indexes_that_lie(models: Any, tmp_path: Path, change: Any, message: str | None):
    folder = pickle_weights(models("llama"), tmp_path / "bin", 3)
    index = json.loads((folder / INDEX).read_text())
    change(folder, index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    if message is None:
        assert_same(folder, models("llama"))
    else:
        assert message in refusal(folder)


def test_shards_without_their_index(models: Any, tmp_path: Path):
    folder = pickle_weights(models("llama"), tmp_path / "bin", 3)
    (folder / INDEX).unlink()
    assert f"{INDEX} is missing beside pytorch_model-00001-of-00003.bin" in refusal(folder)


def test_one_tensor_in_two_shards(models: Any, tmp_path: Path):
    folder = pickle_weights(models("llama"), tmp_path / "bin", 3)
    shard = folder / "pytorch_model-00001-of-00003.bin"
    own = torch.load(shard, weights_only=True)
    torch.save({**own, "lm_head.weight": torch.ones(1), "model.norm.weight": torch.ones(1)}, shard)
    assert "is in pytorch_model-0000" in refusal(folder)


def test_entries_that_are_no_tensors(models: Any, tmp_path: Path):
    folder = pickle_weights(models("llama"), tmp_path / "bin")
    torch.save({"state_dict": {}, "epoch": 3}, folder / "pytorch_model.bin")
    assert "entry 'state_dict' is no tensor (dict); expected named tensors alone" in refusal(folder)
    torch.save([torch.ones(1)], folder / "pytorch_model.bin")
    assert "holds a list; expected named tensors" in refusal(folder)


class TestAdapters:
    """adapter_model.bin, and the names that older PEFT and other trainers write."""

    @pytest.fixture
    def folder(self, models: Any, tmp_path: Path) -> Path:
        shape = shape_of(models("llama").path)
        write(tmp_path / "adapter", shape, new_adapter(shape))
        return tmp_path / "adapter"

    def changed(self, folder: Path, target: Path, change: Any, pickled: bool) -> Path:
        from safetensors.torch import load_file

        shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
        tensors = {change(name): t for name, t in load_file(folder / "adapter_model.safetensors").items()}
        if pickled:
            torch.save(tensors, target / "adapter_model.bin")
        else:
            save_file(tensors, target / "adapter_model.safetensors")
        return target

    @pytest.mark.parametrize("pickled", [True, False])
    @pytest.mark.parametrize(
        "change",
        [
            lambda name: name,
            lambda name: name.removeprefix("base_model.model."),
            lambda name: name.replace(".weight", ".default.weight"),
            lambda name: name.removeprefix("base_model.model.").replace(".weight", ".default.weight"),
        ],
    )
    def test_variants(self, models: Any, folder: Path, tmp_path: Path, change: Any, pickled: bool):
        shape = shape_of(models("llama").path)
        found = AdapterSource(self.changed(folder, tmp_path / "other", change, pickled), shape)
        expected = AdapterSource(folder, shape)
        assert found.spec == expected.spec
        for name in expected.spec.tensors:
            assert torch.equal(found.read(name), expected.read(name))

    def test_a_pickled_adapter_becomes_safetensors(self, folder: Path, tmp_path: Path, run_convert: Any):
        from safetensors.torch import load_file

        other = self.changed(
            folder, tmp_path / "other", lambda n: n.replace(".weight", ".default.weight"), True
        )
        run_convert(load_dir=other, save_dir=tmp_path / "out", save_model_type="peft")
        found, expected = (load_file(one / "adapter_model.safetensors") for one in (tmp_path / "out", folder))
        assert set(found) == set(expected) and all(torch.equal(found[n], t) for n, t in expected.items())

    def test_one_tensor_under_two_names(self, models: Any, folder: Path, tmp_path: Path):
        other = self.changed(folder, tmp_path / "other", lambda name: name, True)
        tensors = torch.load(other / "adapter_model.bin", weights_only=True)
        first = next(iter(tensors))
        tensors[first.replace(".weight", ".default.weight")] = tensors[first].clone()
        torch.save(tensors, other / "adapter_model.bin")
        with pytest.raises(Refused, match="are one tensor under two names"):
            AdapterSource(other, shape_of(models("llama").path))

    def test_a_mix_of_dtypes(self, models: Any, folder: Path, tmp_path: Path):
        other = self.changed(folder, tmp_path / "other", lambda name: name, True)
        tensors = torch.load(other / "adapter_model.bin", weights_only=True)
        name = next(name for name in tensors if "o_proj.lora_B" in name)
        torch.save({**tensors, name: tensors[name].bfloat16()}, other / "adapter_model.bin")
        assert AdapterSource(other, shape_of(models("llama").path)).file.entries[name].dtype is torch.bfloat16
        torch.save({**tensors, name: tensors[name].long()}, other / "adapter_model.bin")
        with pytest.raises(Refused, match=r"has dtype torch\.int64; expected a floating-point one"):
            AdapterSource(other, shape_of(models("llama").path))
