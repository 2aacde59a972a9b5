"""Adapters between PEFT folders and canonical factors; PEFT itself is the judge."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_lora.checkpoint.canonical import shard_ranges, tensor_rule
from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.checkpoint.peft.folder import read_adapter_config
from mindspeed_lora.checkpoint.peft.source import AdapterSource
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES
from tests.support.adapters import ALL, new_adapter, write

RANK = 4
TARGETS = [
    ALL,
    ("linear_qkv", "linear_fc2"),
    ("v_proj", "q_proj", "up_proj"),
    ("all-linear",),
    ("linear_qkv", "gate_proj"),
]


def load_in_peft(model: Any, folder: Path) -> Any:
    """Load with PEFT; any warning about the adapter is an error."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # transformers' own deprecations, which every adapter sees.
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(model, folder)


@pytest.fixture
def shape(models) -> ModelShape:
    return shape_of(models("llama").path)


@pytest.fixture
def folder(shape: ModelShape, tmp_path: Path) -> Path:
    """A whole adapter on the untied Llama."""
    write(tmp_path / "adapter", shape, new_adapter(shape), base_model_name="some/base")
    return tmp_path / "adapter"


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **values}))


def edit(folder: Path, change_tensors: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change_tensors(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def key(module: str, factor: str, layer: int = 1) -> str:
    return f"base_model.model.model.layers.{layer}.{module}.lora_{factor}.weight"


def refusal(folder: Path, shape: ModelShape) -> str:
    with pytest.raises(Refused) as error:
        AdapterSource(folder, shape)
    assert str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_peft_loads_it_and_computes_base_plus_delta(model, tmp_path: Path, targets: tuple[str, ...]):
    shape = shape_of(model.path)
    plan = new_adapter(shape, lora_target_modules=targets, lora_rank_pattern={".*layers.1.*": 2})
    factors = write(tmp_path / "adapter", shape, plan, base_model_name=str(model.path))
    base = model.load().float()
    weights, table = base.state_dict(), FAMILIES[shape.family]
    for part in plan.spec.parts:
        mapping, _ = table.mapping(f"{part.module}.weight")
        lora_a, lora_b = factors[f"{part.name}.lora_a"], factors[f"{part.name}.lora_b"]
        rows = (lora_b,) if part.label else mapping.split(shape, lora_b)
        for name, own in zip(part.hf_modules, rows, strict=True):
            weight = weights[f"{name}.weight"]
            weight.add_(own @ lora_a, alpha=part.scaling)
    tokens = torch.arange(12).view(2, 6)
    expected = base(tokens).logits
    with torch.no_grad():
        found = load_in_peft(model.load().float(), tmp_path / "adapter")(tokens).logits
    assert (found - model.load().float()(tokens).logits).abs().max() > 1e-2
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_reads_back_any_slice(model, tmp_path: Path, targets: tuple[str, ...]):
    shape = shape_of(model.path)
    plan = new_adapter(shape, lora_target_modules=targets)
    factors = write(tmp_path / "adapter", shape, plan)
    source = AdapterSource(tmp_path / "adapter", shape)
    assert (source.config.r, source.config.alpha, source.shared) == (RANK, 8.0, plan.shared)
    assert source.spec == plan.spec
    for name, whole in factors.items():
        assert torch.equal(source.read(name), whole)
        rule = tensor_rule(name)
        for rank in range(4 if rule.axis is not None else 0):
            assert rule.axis is not None
            ranges = shard_ranges(rule, whole.shape[rule.axis], rank, 4)
            expected = torch.cat([whole.narrow(rule.axis, a, b - a) for a, b in ranges], rule.axis)
            assert torch.equal(source.read(name, rule.axis, ranges), expected)


def test_configuration_has_hugging_face_names_and_only_keys_that_peft_knows(folder: Path):
    from peft import LoraConfig

    config = json.loads((folder / "adapter_config.json").read_text())
    assert set(config) <= set(LoraConfig().to_dict())
    assert config["target_modules"] == [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    assert (config["base_model_name_or_path"], config["task_type"]) == ("some/base", "CAUSAL_LM")
    assert config["lora_alpha"] == 8 and isinstance(config["lora_alpha"], int)


def test_dtype_of_the_file(shape: ModelShape, tmp_path: Path):
    write(tmp_path, shape, new_adapter(shape), dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_save_folder_and_iteration_folder(folder: Path, shape: ModelShape, tmp_path: Path):
    save = tmp_path / "save"
    for iteration in (5, 10):
        shutil.copytree(folder, save / f"iter_{iteration:07d}" / "adapter")
    change(save / "iter_0000005" / "adapter", lora_alpha=4)
    (save / "latest_checkpointed_iteration.txt").write_text("10")
    assert AdapterSource(save, shape).config.alpha == 8
    assert AdapterSource(save / "iter_0000005", shape).config.alpha == 4
    assert read_adapter_config(save).r == RANK


def test_what_is_no_adapter(tmp_path: Path, shape: ModelShape, models):
    assert "no such adapter folder" in refusal(tmp_path / "absent", shape)
    assert "no adapter; expected a PEFT folder" in refusal(tmp_path, shape)
    assert "no adapter" in refusal(models("llama").path, shape)


def test_pickled_adapter_that_is_none(folder: Path, shape: ModelShape):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "adapter_model.bin: the file of 36608 bytes is no torch.save archive" in refusal(folder, shape)


def test_part_of_the_keys(folder: Path, shape: ModelShape):
    edit(folder, lambda tensors: tensors.pop(key("self_attn.q_proj", "B")))
    message = refusal(folder, shape)
    assert f"adapter tensors are missing: {key('self_attn.q_proj', 'B')}" in message


def test_an_adapter_of_a_shorter_model(folder: Path, shape: ModelShape):
    last = f".layers.{shape.num_layers - 1}."
    edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if last in name])
    hint = (
        f"reaches {shape.num_layers - 1} layers, and this base has {shape.num_layers}: give the base that it"
    )
    assert hint in refusal(folder, shape)


def test_keys_that_nothing_uses(folder: Path, shape: ModelShape):
    edit(folder, lambda tensors: tensors.update(extra=torch.ones(1)))
    assert "not covered by target_modules, modules_to_save or bias in adapter_config.json: extra" in refusal(
        folder, shape
    )


def test_rank_of_the_tensors_differs(folder: Path, shape: ModelShape):
    change(folder, r=8)
    message = refusal(folder, shape)
    assert "has shape [4, 32]; r 8 on this base model needs [8, 32]" in message


def test_another_base_model(folder: Path, models):
    message = refusal(folder, shape_of(models("qwen2").path))
    assert "k_proj.lora_B.weight has shape [16, 4]; r 4 on this base model needs [32, 4]" in message


def test_a_base_with_other_modules(folder: Path, shape: ModelShape):
    """Phi-3 has q, k and v in one module."""
    import dataclasses

    change(folder, target_modules="all-linear")
    message = refusal(folder, dataclasses.replace(shape, family="phi3"))
    assert "are missing" in message
    assert (
        "; the adapter, made for some/base, has modules that this base has not: give the base that" in message
    )


def test_more_layers_than_the_base(folder: Path, shape: ModelShape):
    import dataclasses

    assert "not covered by" in refusal(folder, dataclasses.replace(shape, num_layers=3))
    assert "are missing" in refusal(folder, dataclasses.replace(shape, num_layers=5))


def test_targets_that_the_model_does_not_have(folder: Path, shape: ModelShape):
    change(folder, target_modules=["query_key_value"])
    message = refusal(folder, shape)
    assert "matches nothing in a llama model; it has q_proj, k_proj, v_proj, o_proj" in message
    change(folder, target_modules=["q_proj", "lm_head"])
    assert "covers lm_head, which is not supported" in refusal(folder, shape)


def test_damaged_file(folder: Path, shape: ModelShape):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert "it is truncated" in refusal(folder, shape)
    (folder / "adapter_config.json").write_text("{")
    assert "not valid JSON" in refusal(folder, shape)
