"""Adapters of packed matrices (Phi-3): one A and one B over all rows of ``qkv_proj``, as in PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_lora.checkpoint.canonical import shard_ranges, tensor_rule
from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.checkpoint.peft.source import AdapterSource
from tests.support.adapters import ALL, new_adapter, write
from tests.support.family_models import GROUPS, HEAD, HEADS, family_model

PEFT_NAMES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_model("phi3", tmp_path_factory.mktemp("packed") / "phi3")


def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def with_peft(folder: Path, adapter: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(transformers_model(folder), adapter)


@pytest.mark.parametrize("targets", [ALL, PEFT_NAMES, ("linear_qkv", "gate_up_proj")], ids=" ".join)
def test_written_and_read_back(phi3: Path, tmp_path: Path, targets: tuple[str, ...]):
    shape = shape_of(phi3)
    plan = new_adapter(shape, lora_target_modules=targets)
    factors = write(tmp_path / "adapter", shape, plan)
    source = AdapterSource(tmp_path / "adapter", shape)
    assert source.spec == plan.spec and source.shared == plan.shared
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.self_attn.qkv_proj"
    assert stored[f"{prefix}.lora_A.weight"].shape == (4, 32)
    name = "decoder.layers.1.self_attention.linear_qkv.lora_b"
    parts = stored[f"{prefix}.lora_B.weight"].split([HEADS * HEAD, GROUPS * HEAD, GROUPS * HEAD])
    grouped = torch.cat([part.reshape(GROUPS, -1, 4) for part in parts], dim=1).flatten(0, 1)
    assert torch.equal(factors[name], grouped)
    for name, whole in factors.items():
        assert torch.equal(source.read(name), whole)
        rule = tensor_rule(name)
        for rank in range(2 if rule.axis is not None else 0):
            assert rule.axis is not None
            ranges = shard_ranges(rule, whole.shape[rule.axis], rank, 2)
            expected = torch.cat([whole.narrow(rule.axis, a, b - a) for a, b in ranges], rule.axis)
            assert torch.equal(source.read(name, rule.axis, ranges), expected)


def test_ours_merged_is_what_peft_merges(phi3: Path, tmp_path: Path, run_convert: Callable[..., None]):
    """Straight to Hugging Face, and by way of a Megatron checkpoint in two shards."""
    shape = shape_of(phi3)
    adapter = tmp_path / "adapter"
    write(adapter, shape, new_adapter(shape))
    expected = with_peft(phi3, adapter).merge_and_unload().state_dict()
    run_convert(load_dir=phi3, save_dir=tmp_path / "one", save_model_type="hf", lora_load=adapter)
    mg = {"save_model_type": "mg", "target_tensor_parallel_size": 2}
    run_convert(load_dir=phi3, save_dir=tmp_path / "mg", lora_load=adapter, **mg)
    run_convert(load_dir=tmp_path / "mg", save_dir=tmp_path / "two", save_model_type="hf")
    base = load_file(phi3 / "model.safetensors")
    for out in ("one", "two"):
        found = load_file(tmp_path / out / "mg2hf" / "model.safetensors")
        assert set(found) == set(base)
        for name, tensor in found.items():
            assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-6), name
    changed = [name for name in base if not torch.equal(base[name], found[name])]
    assert {name.split(".")[-2] for name in changed} == set(PEFT_NAMES)


def test_an_adapter_of_peft_merges_as_there(phi3: Path, tmp_path: Path, run_convert: Callable[..., None]):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, lora_alpha=5, target_modules=["qkv_proj", "gate_up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(transformers_model(phi3), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "theirs")
    expected = model.merge_and_unload().state_dict()
    run_convert(load_dir=phi3, save_dir=tmp_path / "out", save_model_type="hf", lora_load=tmp_path / "theirs")
    found = load_file(tmp_path / "out" / "mg2hf" / "model.safetensors")
    assert all(torch.allclose(tensor, expected[name], rtol=0, atol=1e-6) for name, tensor in found.items())
    run_convert(
        load_dir=tmp_path / "theirs",
        save_dir=tmp_path / "peft",
        save_model_type="peft",
        lora_target_modules=("qkv_proj", "linear_fc1"),
    )
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
