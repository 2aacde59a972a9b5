"""``--extract-lora``: the adapter between two checkpoints, against torch's decomposition, PEFT and what was merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_lora.checkpoint.conversion import svd
from mindspeed_lora.checkpoint.conversion.svd import low_rank_factors
from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.errors import Failed, Refused
from tests.support.adapters import new_adapter, write
from tests.unit.checkpoint.conftest import HfModel, load_weights

EXTRACT = "--extract-lora"


@pytest.fixture(scope="module")
def tuned(models, tmp_path_factory: pytest.TempPathFactory, convert_words) -> Path:
    """The untied Llama with an adapter of rank 4 merged in, in float32."""
    folder = tmp_path_factory.mktemp("tuned")
    shape = shape_of(models("llama").path)
    write(folder / "adapter", shape, new_adapter(shape, lora_target_modules=("all-linear",)))
    convert_words(
        load_dir=models("llama").path,
        save_dir=folder,
        save_model_type="hf",
        lora_load=folder / "adapter",
    )
    return folder / "mg2hf"


def deltas(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one[name].float() - two[name].float() for name in one}


@pytest.mark.parametrize("layout", ["hf", "mg"])
def test_what_was_merged_comes_back(models, tuned: Path, tmp_path: Path, run_convert, capsys, layout: str):
    model, paths = models("llama"), {"tuned": tuned, "base": models("llama").path}
    if layout == "mg":
        for number, name in enumerate(("tuned", "base")):
            run_convert(
                load_dir=paths[name],
                save_dir=tmp_path / name,
                save_model_type="mg",
                target_tensor_parallel_size=2 + 2 * number,
                target_pipeline_parallel_size=2 - number,
            )
            paths[name] = tmp_path / name
    run_convert(
        EXTRACT, load_dir=paths["tuned"], extract_base=paths["base"], lora_r=4, save_dir=tmp_path / "out"
    )
    output = capsys.readouterr()
    assert "total: 100% of ‖Δ‖² of the targets captured" in output.out and "warning" not in output.err
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["base_model_name_or_path"] == str(model.path)
    wanted = deltas(load_weights(tuned), model.tensors)
    checked = 0
    for name, delta in wanted.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{prefix}A.weight" in found:
            product = 2.0 * found[f"{prefix}B.weight"] @ found[f"{prefix}A.weight"]
            assert (product - delta).abs().max() <= 3e-6, name
            checked += 1
    assert checked == 4 * 7
    assert_peft_gives_the_logits(model, tuned, tmp_path / "out")


def assert_peft_gives_the_logits(model: HfModel, tuned: Path, adapter: Path) -> None:
    from peft import PeftModel

    tokens = torch.arange(12)[None]
    with torch.no_grad():
        found = PeftModel.from_pretrained(model.load(), adapter).eval()(tokens).logits
        expected, before = type(model)("", tuned).load()(tokens).logits, model.load()(tokens).logits
    assert (expected - before).abs().max() > 0.1
    assert (found - expected).abs().max() < 2e-4


def test_less_rank_captures_the_best_share(models, tuned: Path, tmp_path: Path, run_convert, capsys):
    run_convert(
        EXTRACT,
        "--use-rslora",
        load_dir=tuned,
        extract_base=models("llama").path,
        lora_r=2,
        lora_alpha=3,
        lora_target_modules=("q_proj", "linear_fc2"),
        save_dir=tmp_path / "out",
    )
    output = capsys.readouterr()
    wanted = deltas(load_weights(tuned), models("llama").tensors)
    best: dict[str, list[float]] = {"q_proj": [0, 0], "down_proj": [0, 0]}
    for name, delta in wanted.items():
        kind = name.split(".")[-2]
        if kind in best:
            squares = torch.linalg.svdvals(delta.double()).square()
            best[kind] = [best[kind][0] + float(squares[:2].sum()), best[kind][1] + float(squares.sum())]
    for kind, (captured, norm) in best.items():
        assert f"{kind}: {100 * captured / norm:.4g}% of ‖Δ‖² captured" in output.out
    assert "leaves out differences outside of its targets" in output.err and "and 15 others" in output.err
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    product = 3 / 2**0.5 * found[f"{prefix}B.weight"] @ found[f"{prefix}A.weight"]
    left, values, right = torch.linalg.svd(wanted["model.layers.0.self_attn.q_proj.weight"])
    assert (product - left[:, :2] * values[:2] @ right[:2]).abs().max() < 1e-5


def test_other_tensors_are_told_or_saved(models, tuned: Path, tmp_path: Path, run_convert, capsys):
    tensors = load_weights(tuned)
    tensors["model.norm.weight"] += 0.5
    tensors["lm_head.weight"][7] -= 1
    (tmp_path / "more").mkdir()
    save_file(tensors, tmp_path / "more" / "model.safetensors")
    (tmp_path / "more" / "config.json").write_text((tuned / "config.json").read_text())
    given: dict[str, Any] = {
        "load_dir": tmp_path / "more",
        "extract_base": models("llama").path,
        "lora_r": 4,
    }
    run_convert(EXTRACT, save_dir=tmp_path / "one", **given)
    error = capsys.readouterr().err
    assert "lm_head.weight (‖Δ‖ 5.66), model.norm.weight (‖Δ‖ 2.83)" in error
    run_convert(EXTRACT, save_dir=tmp_path / "two", lora_modules_to_save=("lm_head", "norm"), **given)
    error = capsys.readouterr().err
    assert "warning" not in error
    assert_peft_gives_the_logits(models("llama"), tmp_path / "more", tmp_path / "two")


def test_what_cannot_be_extracted(models, tuned: Path, tmp_path: Path, run_convert):
    base, out = models("llama").path, tmp_path / "out"
    given: dict[str, Any] = {"load_dir": base, "extract_base": base, "lora_r": 4, "save_dir": out}
    with pytest.raises(Refused, match="nothing to extract, .* equal in every target and in everything else"):
        run_convert(EXTRACT, **given)
    with pytest.raises(Refused, match=r"is a llama model|num_query_groups is 4 in .*, but 8"):
        run_convert(EXTRACT, **{**given, "extract_base": models("qwen2").path})
    with pytest.raises(Refused, match="needs --lora-r"):
        run_convert(EXTRACT, load_dir=base, extract_base=base, save_dir=out)
    with pytest.raises(Refused, match="needs --extract-base"):
        run_convert(EXTRACT, load_dir=base, lora_r=4, save_dir=out)
    with pytest.raises(Refused, match="give --save-model-type peft"):
        run_convert(EXTRACT, save_model_type="hf", **given)
    with pytest.raises(Refused, match="without --extract-lora"):
        run_convert(load_dir=base, extract_base=base, save_dir=out, save_model_type="hf")
    tensors = load_weights(tuned)
    tensors["model.layers.2.mlp.up_proj.weight"][1, 1] = float("nan")
    (tmp_path / "nan").mkdir()
    save_file(tensors, tmp_path / "nan" / "model.safetensors")
    (tmp_path / "nan" / "config.json").write_text((tuned / "config.json").read_text())
    with pytest.raises(Failed, match=r"model.layers.2.mlp.up_proj .* NaN or infinite"):
        run_convert(EXTRACT, **{**given, "load_dir": tmp_path / "nan"})
    assert not out.exists()


def test_large_matrices_are_approximated_as_well(monkeypatch):
    monkeypatch.setattr(svd, "EXACT_SIZE", 64)
    torch.manual_seed(0)
    low = torch.randn(300, 5) @ torch.randn(5, 200)
    lora_a, lora_b, captured = low_rank_factors(low, 5, 0.5)
    assert (0.5 * lora_b @ lora_a - low).abs().max() < 2e-5 * low.abs().max()
    assert captured == pytest.approx(float(low.double().square().sum()), rel=1e-6)
    noise = torch.randn(300, 200)
    _, _, captured = low_rank_factors(noise, 8, 2.0)
    best = float(torch.linalg.svdvals(noise.double())[:8].square().sum())
    # A flat spectrum is the hardest one.
    assert 0.99 * best < captured <= best * (1 + 1e-6)
