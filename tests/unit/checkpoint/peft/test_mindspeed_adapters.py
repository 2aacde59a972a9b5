"""MindSpeed-LLM's wrapped adapters in Megatron files, written by code of the tests' own; PEFT is the judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.checkpoint.peft.plan import plan_adapter
from mindspeed_lora.checkpoint.peft.source import AdapterSource
from mindspeed_lora.checkpoint.source import open_source
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.errors import Refused
from tests.support.megatron_files import Layout, Tensors
from tests.support.wrapped_adapters import LORA_ARGS, TOKENS, Trained, wrapped

Convert = Callable[..., None]
LAYOUTS = [Layout(), Layout(tp=2, pp=2), Layout(tp=2, vp=2), Layout(tp=4, pp=2, vp=2)]
Q_A = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def trained() -> dict[str, Trained]:
    return {}


@pytest.fixture
def adapter(models: Any, trained: dict[str, Trained]) -> Trained:
    """The adapter on the untied Llama."""
    return trained.setdefault("llama", Trained(models("llama")))


def assert_peft_has(folder: Path, adapter: Trained) -> None:
    """PeftModel.from_pretrained of the folder has the very factors and logits that were trained."""
    from peft import PeftModel

    found = load_file(folder / "adapter_model.safetensors")
    assert set(found) == set(adapter.factors)
    assert all(torch.equal(found[name], tensor) for name, tensor in adapter.factors.items())
    with torch.no_grad():
        logits = PeftModel.from_pretrained(adapter.model.load(), folder)(TOKENS).logits
        plain = adapter.model.load()(TOKENS).logits
    assert torch.equal(logits, adapter.logits) and (logits - plain).abs().max() > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_filtered_checkpoint_to_peft(adapter: Trained, tmp_path: Path, run_convert: Convert, layout: Layout):
    """What --lora-ckpt-filter saves, by both ways of asking for the adapter alone."""
    folder = adapter.write(tmp_path / "mg", layout)
    config_dir = adapter.model.path
    run_convert(
        "--save-lora-to-hf",
        "--load-checkpoint-loosely",
        load_dir=folder,
        save_dir=tmp_path / "hf",
        load_model_type="mg",
        save_model_type="hf",
        hf_cfg_dir=config_dir,
        lora_r=4,
        lora_alpha=12,
        lora_target_modules=("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
    )
    assert_peft_has(tmp_path / "hf" / "mg2hf", adapter)
    run_convert(load_dir=folder, save_dir=tmp_path / "peft", save_model_type="peft")
    assert_peft_has(tmp_path / "peft", adapter)
    config = json.loads((tmp_path / "hf/mg2hf/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 12, str(config_dir))
    assert config["target_modules"] == [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


@pytest.mark.parametrize("layout", LAYOUTS[1:3], ids=str)
def test_merge_into_any_target(adapter: Trained, tmp_path: Path, run_convert: Convert, layout: Layout):
    folder = adapter.write(tmp_path / "mg", layout, with_base=True, change=wrapped)
    alone = adapter.write(tmp_path / "alone", Layout(tp=4))
    flags = {"load_model_type": "mg", "hf_cfg_dir": adapter.model.path}
    run_convert(load_dir=folder, lora_load=alone, save_dir=tmp_path / "a", save_model_type="hf", **flags)
    # Base and adapter in one checkpoint, told by the flags.
    run_convert(load_dir=folder, lora_r=4, save_dir=tmp_path / "b", save_model_type="hf", **flags)
    run_convert(
        load_dir=adapter.model.path, lora_load=folder, save_dir=tmp_path / "c", save_model_type="mg",
        target_tensor_parallel_size=2, load_model_type="hf",
    )  # fmt: skip
    merged = adapter.merged()
    for name in "ab":
        found = load_file(tmp_path / name / "mg2hf" / "model.safetensors")
        assert set(found) == set(merged)
        assert all(torch.equal(found[key], tensor) for key, tensor in merged.items())
    one, two = open_source(tmp_path / "c"), open_source(tmp_path / "a" / "mg2hf")
    assert all(torch.equal(one.read(name), two.read(name)) for name in two.names())


def test_base_of_a_wrapped_checkpoint_is_read_alone(
    adapter: Trained, tmp_path: Path, capsys: Any, run_convert: Convert
):
    folder = adapter.write(tmp_path / "mg", Layout(tp=2), with_base=True, change=wrapped)
    run_convert(
        load_dir=folder, save_dir=tmp_path / "out", save_model_type="hf", hf_cfg_dir=adapter.model.path
    )
    found = load_file(tmp_path / "out" / "mg2hf" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in adapter.base.items())
    assert "LoRA factors" in capsys.readouterr().err


def test_training_starts_from_it(adapter: Trained, tmp_path: Path):
    folder = adapter.write(tmp_path / "mg", Layout(tp=2, pp=2))
    shape = shape_of(adapter.model.path)
    plan = plan_adapter(LoraConfig(lora_load=str(folder)), shape, 1)
    assert plan is not None and plan.source is not None
    assert plan.shared == {"linear_qkv", "linear_fc1"} and plan.config.alpha == 12
    found = plan.source.read("decoder.layers.2.self_attention.linear_qkv.lora_a")
    assert torch.equal(found, adapter.factors[Q_A.format(2)])


def test_alpha_comes_from_the_files_or_a_flag(adapter: Trained, tmp_path: Path, run_convert: Convert):
    folder = adapter.write(tmp_path / "mg", Layout(), args={})
    shape = shape_of(adapter.model.path)
    with pytest.raises(Refused, match="args tells no lora_alpha .*give --lora-alpha"):
        AdapterSource(folder, shape)
    assert AdapterSource(folder, shape, lora=LoraConfig(lora_alpha=7)).config.alpha == 7
    told = adapter.write(tmp_path / "told", Layout())
    with pytest.raises(Refused, match=r"--lora-alpha 7 \(the adapter has 12\): contradicting"):
        run_convert(load_dir=told, save_dir=tmp_path / "out", save_model_type="peft", lora_alpha=7)


def test_without_args_the_model_must_be_named(adapter: Trained, tmp_path: Path, run_convert: Convert):
    folder = adapter.write(tmp_path / "mg", Layout(tp=2), change=lambda content: content.pop("args"))
    flags = {"load_dir": folder, "save_dir": tmp_path / "out", "save_model_type": "peft", "lora_alpha": 12}
    with pytest.raises(Refused, match="holds no args.*--hf-cfg-dir"):
        run_convert(**flags)
    run_convert(**flags, hf_cfg_dir=adapter.model.path)
    assert_peft_has(tmp_path / "out", adapter)


def on_rank(rank: int, edit: Callable[[Tensors], Any]) -> Callable[[dict[str, Any]], None]:
    """Edits the model of the rank that is the n-th to be written."""
    count = iter(range(99))

    def change(content: dict[str, Any]) -> None:
        if next(count) == rank:
            edit(content["model"])

    return change


QKV_A = "decoder.layers.0.self_attention.linear_qkv.lora_A.default.weight"
PROJ_B = "decoder.layers.1.self_attention.linear_proj.lora_B.default.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: model.update({QKV_A: model[QKV_A] + 1}),
            r"layers.0.self_attention.linear_qkv.lora_a differs",
        ),
        (
            lambda model: model.update({PROJ_B: model[PROJ_B] + 1}),
            r"layers.1.self_attention.linear_proj.lora_b differs",
        ),
        (lambda model: model.pop(QKV_A), "linear_qkv.lora_a is in 1 of 2 tensor-parallel ranks"),
        (lambda model: model.update({QKV_A: torch.ones(3, 32)}), "linear_qkv.lora_a has the shapes"),
        (
            lambda model: model.update({"decoder.layers.0.mlp.experts.weight1_lora_a": torch.ones(2)}),
            "weight1_lora_a stacks experts, but .* mean a dense model",
        ),
        (
            lambda model: model.update(
                {"decoder.layers.0.mlp.router.lora_A.default.weight": torch.ones(4, 2)}
            ),
            "is missing from an earlier tensor-parallel rank",
        ),
    ],
)
def test_ranks_that_do_not_belong_together(adapter: Trained, tmp_path: Path, change: Any, message: str):
    folder = adapter.write(tmp_path / "mg", Layout(tp=2), change=on_rank(1, change))
    with pytest.raises(Refused, match=message) as error:
        AdapterSource(folder, shape_of(adapter.model.path))
    assert str(tmp_path) in str(error.value)


def test_what_does_not_fit_the_model(adapter: Trained, models: Any, tmp_path: Path):
    folder = adapter.write(tmp_path / "mg", Layout(tp=2))
    with pytest.raises(Refused, match=r"lora_b has shape \[64, 4\] .* needs \[96, r\]"):
        AdapterSource(folder, shape_of(models("qwen2").path))
    other = adapter.write(tmp_path / "rank", Layout(), args={**LORA_ARGS, "lora_r": 8})
    with pytest.raises(Refused, match="the factors have rank 4, args.lora_r is 8"):
        AdapterSource(other, shape_of(adapter.model.path))
    half = adapter.write(
        tmp_path / "half", Layout(), change=lambda content: content["model"].pop(QKV_A.replace("_A", "_B"))
    )
    with pytest.raises(Refused, match="linear_qkv has lora_a only; the adapter is incomplete"):
        AdapterSource(half, shape_of(adapter.model.path))
    with pytest.raises(Refused, match="holds an adapter only; give it to --lora-load"):
        open_source(folder)


def test_peft_to_mg_is_what_training_loads(adapter: Trained, tmp_path: Path, run_convert: Convert):
    mindspeed = adapter.write(tmp_path / "ms", Layout(tp=2, pp=2))
    run_convert(load_dir=mindspeed, save_dir=tmp_path / "peft", save_model_type="peft")
    run_convert(
        load_dir=tmp_path / "peft", save_dir=tmp_path / "run", load_model_type="peft", save_model_type="mg",
        target_tensor_parallel_size=2,
    )  # fmt: skip
    run = tmp_path / "run"
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "1"
    for folder in (run / "iter_0000001" / "adapter", run / "adapter"):
        assert_peft_has(folder, adapter)
    for given in (run, run / "iter_0000001"):
        plan = plan_adapter(LoraConfig(lora_load=str(given)), shape_of(adapter.model.path), 1)
        assert plan is not None and plan.source is not None and plan.config.alpha == 12
    with pytest.raises(Refused, match="--load-model-type peft: .*--save-lora-to-hf"):
        run_convert(
            load_dir=tmp_path / "peft", save_dir=tmp_path / "x", load_model_type="peft", save_model_type="hf"
        )
