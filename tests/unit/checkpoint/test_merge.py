"""Merged weights against PEFT's merge_and_unload, bit for bit, for our adapters and PEFT's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_lora.checkpoint.adapter import AdapterSource
from mindspeed_lora.checkpoint.canonical import tensor_rule
from mindspeed_lora.checkpoint.hf import HfSource
from mindspeed_lora.checkpoint.merge import CastSource, MergedSource, merge_weight
from mindspeed_lora.errors import Refused


def peft_adapter(base: Any, folder: Path, **config: Any) -> None:
    """An adapter made and saved by PEFT, its factors (a different A for each module) random."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **config))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)


def merged_by_peft(base: Any, folder: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    state: dict[str, torch.Tensor] = PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    return state


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ALL},
        {"target_modules": ["q_proj", "v_proj", "up_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ALL, "layers_to_transform": [1, 3]},
        {"target_modules": r".*self_attn.*(k|o)_proj", "init_lora_weights": "gaussian"},
        {"target_modules": ALL, "exclude_modules": ["down_proj"], "lora_dropout": 0.5},
    ],
    ids=["all", "part", "rslora", "layers", "regex", "exclude"],
)
def test_merged_equals_merge_and_unload(model, tmp_path: Path, config: dict[str, Any]):
    peft_adapter(model.load(), tmp_path / "adapter", **config)
    expected = merged_by_peft(model.load(), tmp_path / "adapter")
    base = HfSource(model.path)
    source = MergedSource(base, AdapterSource(tmp_path / "adapter", base.shape))
    changed = 0
    for name in source.names():
        mapping, layer = base.family.mapping(name)
        merged = source.read(name)
        changed += not torch.equal(merged, base.read(name))
        for hf_name, part in zip(mapping.names(layer), mapping.split(base.shape, merged), strict=True):
            assert part.dtype == expected[hf_name].dtype
            assert torch.equal(part, expected[hf_name]), hf_name
    assert changed >= 4


def test_slices_are_those_of_the_whole(models, tmp_path: Path):
    model = models("llama-tied")
    peft_adapter(model.load(), tmp_path, target_modules=ALL)
    base = HfSource(model.path)
    source = MergedSource(base, AdapterSource(tmp_path, base.shape))
    for name in source.names():
        axis, whole = tensor_rule(name).axis, source.read(name)
        if axis is not None:
            half = whole.shape[axis] // 2
            assert torch.equal(source.read(name, axis, [(half, 2 * half)]), whole.narrow(axis, half, half))


def test_order_of_the_formula_and_one_rounding():
    weight = torch.randn(6, 5).bfloat16()
    lora_a, lora_b = torch.randn(2, 5), torch.randn(6, 2)
    exact = weight.double() + (lora_b.double() @ lora_a.double()) * 0.5
    merged = merge_weight(weight, lora_a, lora_b, 0.5)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.float().bfloat16())


def test_adapter_of_another_model_is_refused(models, tmp_path: Path):
    peft_adapter(models("qwen2").load(), tmp_path, target_modules=ALL)
    with pytest.raises(Refused, match=r"k_proj.lora_B.weight has shape \[32, 4\]; .* needs \[16, 4\]"):
        AdapterSource(tmp_path, HfSource(models("llama").path).shape)


def test_cast(models):
    base = HfSource(models("llama").path)
    source = CastSource(base, torch.bfloat16)
    assert source.shape.params_dtype == "bfloat16"
    for name in source.names():
        assert source.dtype(name) == torch.bfloat16
        assert torch.equal(source.read(name), base.read(name).bfloat16())
