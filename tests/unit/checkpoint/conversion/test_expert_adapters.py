"""convert_ckpt.py on adapters of experts: merged, taken out, extracted, exported in either form, inspected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.checkpoint.peft.source import AdapterSource
from tests.support.moe_models import moe_model
from tests.unit.checkpoint.conversion.conftest import Command

FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moe_model(request.param, tmp_path_factory.mktemp("moe") / request.param)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fused adapter made by PEFT, beside its merged model as transformers saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=FUSED, task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    model.save_pretrained(folder / "peft")
    model.merge_and_unload().save_pretrained(folder / "merged")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def same_factors(base: Path, one: Path, other: Path) -> bool:
    first, second = (AdapterSource(folder, shape_of(base)) for folder in (one, other))
    assert set(first.hf_modules) == set(second.hf_modules)
    return all(
        torch.equal(a, b)
        for module in first.hf_modules
        for a, b in zip(first.factors(module)[:2], second.factors(module)[:2], strict=True)
    )


def test_merged_taken_out_and_extracted(command: Command, base: Path, adapter: Path, tmp_path: Path):
    """The bits of PEFT's merge_and_unload in float32; what is extracted from it again is it."""
    hf = ("--load-model-type", "hf", "--save-model-type", "hf")
    assert not command(
        *hf, "--load-dir", base, "--lora-load", adapter / "peft", "--save-dir", tmp_path / "m"
    ).status
    merged, expected, before = tensors(tmp_path / "m" / "mg2hf"), tensors(adapter / "merged"), tensors(base)
    assert set(merged) == set(expected)
    assert all(torch.equal(merged[name], value) for name, value in expected.items())
    words = (*hf, "--load-dir", tmp_path / "m" / "mg2hf", "--lora-load", adapter / "peft", "--unmerge")
    assert not command(*words, "--save-dir", tmp_path / "u").status
    again = tensors(tmp_path / "u" / "mg2hf")
    # One rounding of W + Δ and one of its difference, of values below 2.
    assert max(float((again[name] - value).abs().max()) for name, value in before.items()) < 2.5e-7
    words = ("--load-model-type", "hf", "--save-model-type", "peft", "--extract-lora", "--lora-r", "3")
    words += ("--lora-target-modules", "q_proj", "experts.linear_fc1", "experts.linear_fc2")
    found = command(
        *words, "--load-dir", adapter / "merged", "--extract-base", base, "--save-dir", tmp_path / "x"
    )
    assert not found.status and "total: 100% of" in found.out
    source = AdapterSource(tmp_path / "x", shape_of(base))
    # gate and up are decomposed apart: two blocks of one parameter.
    assert source.config.separate_gate_up and source.config.moe_format == "fused"
    for name, value in expected.items():
        module = name.removesuffix(".weight")
        if module in source.hf_modules:
            lora_a, lora_b, scaling = source.factors(module)
            # float32 rounding of the merged weights (1e-7 of values below 4) limits what is found again.
            assert torch.allclose(before[name] + (lora_b @ lora_a) * scaling, value, atol=2e-6)


def test_exported_in_either_form(command: Command, base: Path, adapter: Path, tmp_path: Path):
    peft = ("--load-model-type", "peft", "--save-model-type", "peft")
    for form, load in (("per-expert", adapter / "peft"), ("fused", tmp_path / "per-expert")):
        words = (*peft, "--load-dir", load, "--peft-moe-format", form, "--hf-cfg-dir", base)
        assert not command(*words, "--save-dir", tmp_path / form).status
        values = json.loads((tmp_path / form / "adapter_config.json").read_text())
        assert bool(values["target_parameters"]) == (form == "fused")
        assert same_factors(base, adapter / "peft", tmp_path / form)
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "fused", adapter / "peft")
    )
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_without_the_base_it_is_copied_as_it_is(command: Command, base: Path, adapter: Path, tmp_path: Path):
    words = ("--load-model-type", "peft", "--save-model-type", "peft")
    given = ("--base-model-name", "some/base")
    assert not command(*words, *given, "--load-dir", adapter / "peft", "--save-dir", tmp_path / "copy").status
    again = command(
        *words, "--load-dir", tmp_path / "copy", "--save-dir", tmp_path / "again", "--lora-r", "3"
    )
    assert not again.status, again.error
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "copy" / "adapter_model.safetensors"
    ).read_bytes()
    changed = (
        *words,
        "--load-dir",
        tmp_path / "copy",
        "--save-dir",
        tmp_path / "x",
        "--peft-moe-format",
        "per-expert",
    )
    refused = command(*changed)
    assert refused.status == 2 and "--hf-cfg-dir" in refused.refusal
    contradicted = command(
        *words, "--load-dir", tmp_path / "copy", "--save-dir", tmp_path / "x", "--lora-r", "4"
    )
    assert contradicted.status == 2 and "--lora-r 4 (the adapter has 3)" in contradicted.refusal


def test_to_megatron_and_back(command: Command, base: Path, adapter: Path, tmp_path: Path):
    words = ("--load-model-type", "peft", "--save-model-type", "mg", "--load-dir", adapter / "peft")
    assert not command(*words, "--save-dir", tmp_path / "mg").status
    words = ("--load-model-type", "peft", "--save-model-type", "peft", "--load-dir", tmp_path / "mg")
    assert not command(*words, "--save-dir", tmp_path / "back").status
    assert same_factors(base, adapter / "peft", tmp_path / "back")


def inspected(command: Command, folder: Path) -> Any:
    found = command("inspect", folder, "--json")
    assert not found.status, found.error
    return json.loads(found.out)


def test_inspect_counts_matrices_and_knows_vllm(command: Command, base: Path, adapter: Path, tmp_path: Path):
    """vLLM has a module for each expert of these families."""
    layers = [layer for layer in range(4) if shape_of(base).has_experts(layer)]
    found = inspected(command, adapter / "peft")["adapter"]
    assert found["ranks"] == {"3": 4 + 3 * 4 * len(layers)} and found["not_supported"] is None
    assert found["target_parameters"] and not found["vllm"]["loads"]
    assert "--peft-moe-format per-expert" in found["vllm"]["reasons"][0]
    words = ("--load-model-type", "peft", "--save-model-type", "peft", "--peft-moe-format", "per-expert")
    assert not command(
        *words, "--load-dir", adapter / "peft", "--hf-cfg-dir", base, "--save-dir", tmp_path / "p"
    ).status
    again = inspected(command, tmp_path / "p")["adapter"]
    assert again["ranks"] == found["ranks"] and again["vllm"]["loads"]
