"""Hugging Face folders that are sharded, damaged or lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_lora.checkpoint.source import open_source
from mindspeed_lora.errors import Refused


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def change_weights(folder: Path, remove: tuple[str, ...] = (), **tensors: torch.Tensor) -> None:
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if name not in remove}
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({**weights, **named}, folder / "model.safetensors")


def refusal(folder: Path) -> str:
    with pytest.raises(Refused) as error:
        open_source(folder)
    message = str(error.value)
    assert str(folder) in message and message.count("\n") == 0
    return message


def shard(folder: Path) -> dict[str, str]:
    """Cut a folder's one file into two with an index; returns the weight map."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    weight_map = {name: file for file, part in files.items() for name in part}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_read_as_one(own_model):
    before = open_source(own_model.path)
    whole = {name: before.read(name) for name in before.names()}
    shard(own_model.path)
    source = open_source(own_model.path)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in whole.items())


def test_missing_shard(own_model):
    shard(own_model.path)
    (own_model.path / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: the file is missing" in refusal(own_model.path)


def test_truncated_shard(own_model):
    shard(own_model.path)
    file = own_model.path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "it is truncated" in refusal(own_model.path)


def test_empty_file(own_model):
    (own_model.path / "model.safetensors").write_bytes(b"")
    assert "model.safetensors: the file is empty" in refusal(own_model.path)


@pytest.mark.parametrize("target", ["../blobs/gone", "model.safetensors"], ids=["nowhere", "itself"])
def test_a_link_that_leads_nowhere(own_model, target: str):
    file = own_model.path / "model.safetensors"
    file.unlink()
    file.symlink_to(target)
    told = f"{file}: the file is missing; it is a link to {target}, and nothing is there"
    assert told in refusal(own_model.path)


def test_index_that_lies(own_model):
    weight_map = shard(own_model.path)
    name = sorted(weight_map)[0]
    write_index(own_model.path, {**weight_map, name: "model-00002-of-00002.safetensors"})
    assert f"{name} should be in model-00002-of-00002.safetensors, but it is in" in refusal(own_model.path)
    write_index(own_model.path, {**weight_map, "ghost": "model-00002-of-00002.safetensors"})
    assert "ghost should be in model-00002-of-00002.safetensors, but it is not" in refusal(own_model.path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "weight_map is missing or empty"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "not a file name"),
    ],
)
def test_damaged_index(own_model, index: str, message: str):
    (own_model.path / "model.safetensors.index.json").write_text(index)
    assert message in refusal(own_model.path)


def test_tensor_in_two_shards(own_model):
    weight_map = shard(own_model.path)
    one, two = (own_model.path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    name = next(name for name, file in weight_map.items() if file == one.name)
    save_file({**load_file(two), name: load_file(one)[name]}, two)
    assert f"tensor {name} is in {one.name} and {two.name}" in refusal(own_model.path)


def test_shards_without_index(own_model):
    shard(own_model.path)
    (own_model.path / "model.safetensors.index.json").unlink()
    assert "model.safetensors.index.json is missing beside model-00001" in refusal(own_model.path)


def test_pickled_weights_that_are_none(own_model):
    (own_model.path / "model.safetensors").rename(own_model.path / "pytorch_model.bin")
    assert "pytorch_model.bin: the file of" in refusal(own_model.path)


def test_no_weights_at_all(own_model):
    (own_model.path / "model.safetensors").unlink()
    assert "no weights" in refusal(own_model.path)


def test_missing_tensors(own_model):
    change_weights(own_model.path, remove=("model.layers.1.mlp.up_proj.weight", "model.norm.weight"))
    message = refusal(own_model.path)
    assert "missing from the weight files: model.layers.1.mlp.up_proj.weight, model.norm.weight." in message


def test_tensors_that_nothing_uses(own_model):
    change_weights(own_model.path, **{"model__layers__0__mlp__extra": torch.ones(1)})
    assert "not known in a llama model with this config.json: model.layers.0.mlp.extra." in refusal(
        own_model.path
    )


def test_more_layers_than_the_configuration_says(own_model):
    change_config(own_model.path, num_hidden_layers=3)
    message = refusal(own_model.path)
    assert "not known in a llama model" in message
    assert "model.layers.3." in message and message.endswith("and 6 more.")


def test_rotary_tables_of_old_checkpoints_are_left_out(own_model):
    change_weights(own_model.path, **{"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(2)})
    open_source(own_model.path)


def test_shapes_that_differ_from_the_configuration_are_both_named(own_model):
    change_config(own_model.path, intermediate_size=64)
    message = refusal(own_model.path)
    assert "model.safetensors: tensor model.layers.0.mlp.gate_proj.weight has shape [48, 32]" in message
    assert "config.json means [64, 32]" in message


def test_dtype_that_is_no_weight(own_model):
    change_weights(own_model.path, **{"model__norm__weight": torch.ones(32, dtype=torch.int8)})
    assert "model.norm.weight has dtype torch.int8" in refusal(own_model.path)


def test_fused_matrices_of_two_dtypes(own_model):
    half = torch.ones(16, 32, dtype=torch.bfloat16)
    change_weights(own_model.path, **{"model__layers__0__self_attn__k_proj__weight": half})
    assert "k_proj.weight is torch.bfloat16 and" in refusal(own_model.path)


def test_tied_model_may_repeat_its_embedding(own_model):
    embedding = load_file(own_model.path / "model.safetensors")["model.embed_tokens.weight"]
    change_config(own_model.path, tie_word_embeddings=True)
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(own_model.path)
    change_weights(own_model.path, **{"lm_head__weight": embedding.clone()})
    source = open_source(own_model.path)
    assert "output_layer.weight" not in source.names()


def test_dtype_of_the_shape_is_that_of_the_files(own_model):
    change_config(own_model.path, dtype="bfloat16")
    assert open_source(own_model.path).shape.params_dtype == "float32"


def test_config_that_is_no_json(own_model):
    (own_model.path / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refusal(own_model.path)


def test_config_of_another_kind(own_model):
    change_config(own_model.path, model_type="gpt2")
    assert "config.json: model_type 'gpt2' is not supported" in refusal(own_model.path)
