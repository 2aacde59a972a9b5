from __future__ import annotations

import json
from pathlib import Path

import torch

from mindspeed_lora.checkpoint.engine import execute
from mindspeed_lora.checkpoint.formats.hf import HfSource
from mindspeed_lora.checkpoint.formats.hf_writer import plan_hf, shard_names
from mindspeed_lora.checkpoint.source import open_source


def test_names_are_those_of_transformers():
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_sharded_folder(models, tmp_path: Path):
    model = models("llama")
    execute(plan_hf(HfSource(model.path), model.path, max_shard_bytes=40_000), tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files == shard_names(len(files))
    assert all((tmp_path / name).stat().st_size < 42_000 for name in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.tensors)
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in model.tensors.values())
    again = type(model)("", tmp_path)
    assert set(again.tensors) == set(model.tensors)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in model.tensors.items())
    assert torch.equal(again.load()(torch.arange(5)[None]).logits, model.load()(torch.arange(5)[None]).logits)
    open_source(tmp_path)


def test_dtype_key_of_older_configurations(own_model, tmp_path: Path):
    config = json.loads((own_model.path / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype").replace("float32", "bfloat16")
    (own_model.path / "config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    execute(plan_hf(HfSource(own_model.path), own_model.path), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == "float32" and "dtype" not in written
