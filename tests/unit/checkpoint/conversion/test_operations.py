"""The operations by their flags: what convert_ckpt.py writes, tells and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.errors import Refused
from tests.support.adapters import new_adapter, write
from tests.unit.checkpoint.conftest import load_weights


@pytest.fixture
def adapters(models, tmp_path: Path) -> dict[str, Path]:
    """Adapters on the untied Llama by name; ``norms`` also trains the norms whole."""
    shape = shape_of(models("llama").path)
    plans = {
        "all": new_adapter(shape),
        "some": new_adapter(shape, r=3, alpha=7, lora_target_modules=("q_proj", "down_proj")),
        "norms": new_adapter(shape, lora_target_modules=("v_proj",), lora_modules_to_save=("norm",)),
    }
    for name, plan in plans.items():
        write(tmp_path / name, shape, plan)
    return {name: tmp_path / name for name in plans}


def test_several_adapters_are_merged_and_taken_out_again(
    models, adapters: dict[str, Path], tmp_path: Path, run_convert, capsys
):
    model, both = models("llama"), (adapters["all"], adapters["some"])
    mg = {"save_model_type": "mg", "lora_load": both, "lora_weights": ("0.5", "-2")}
    run_convert(load_dir=model.path, save_dir=tmp_path / "mg", target_tensor_parallel_size=2, **mg)
    assert "tokenizers and chat templates, the base's is taken" in capsys.readouterr().err
    back = {**mg, "save_model_type": "hf"}
    run_convert("--unmerge", load_dir=tmp_path / "mg", save_dir=tmp_path / "hf", **back)
    assert "merging again would leave a difference of at most" in capsys.readouterr().out
    found = load_weights(tmp_path / "hf" / "mg2hf")
    for name, tensor in model.tensors.items():
        assert (found[name] - tensor).abs().max() < 2e-6, name


def test_the_vocabulary_is_padded_to_a_size(models, tmp_path: Path, run_convert):
    model = models("llama")
    to_mg: dict[str, Any] = {"load_dir": model.path, "save_dir": tmp_path / "mg", "save_model_type": "mg"}
    run_convert(target_tensor_parallel_size=4, pad_vocab_size_to=128, **to_mg)
    for rank in range(4):
        file = tmp_path / f"mg/iter_0000001/mp_rank_{rank:02d}/model_optim_rng.pt"
        stored = torch.load(file, weights_only=False)
        assert stored["args"].padded_vocab_size == 128
        assert stored["model"]["output_layer.weight"].shape == (32, 32)
    assert not stored["model"]["embedding.word_embeddings.weight"][101 - 96 :].any()
    run_convert(load_dir=tmp_path / "mg", save_dir=tmp_path / "hf", save_model_type="hf")
    assert load_weights(tmp_path / "hf/mg2hf")["lm_head.weight"].shape == (101, 32)


def test_what_float16_does_not_hold_is_told_once(own_model, tmp_path: Path, run_convert, capsys):
    tensors = own_model.tensors
    tensors["model.norm.weight"][:3] = 1e6
    tensors["lm_head.weight"][0, 0] = float("inf")
    tensors["lm_head.weight"][1, :5] = 1e-9
    save_file(tensors, own_model.path / "model.safetensors", {"format": "pt"})
    run_convert(load_dir=own_model.path, save_dir=tmp_path / "out", save_model_type="hf", params_dtype="fp16")
    error = capsys.readouterr().err
    assert "warning: 1 NaN or infinite values in 1 tensors, copied as they are" in error
    assert "3 values in 1 tensors are beyond ±65504 and became infinite (most in decoder.final_l" in error
    assert "5 values in 1 tensors became zero (most in output_layer.weight: 5)" in error
    assert json.loads((tmp_path / "out/mg2hf/config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize(
    ("words", "flags", "message"),
    [
        (["--unmerge"], {"lora_load": ("norms",)}, "norms holds .* which are gone since it was merged"),
        (["--unmerge"], {}, "--unmerge is given without --lora-load"),
        ([], {"lora_load": ("norms", "norms")}, "both .*norms and .*norms hold .*layernorm.weight in place"),
        ([], {"lora_load": ("all", "some"), "lora_weights": ("1",)}, "gives 1 numbers for 2 adapters"),
        (
            [],
            {"lora_load": ("all",), "lora_weights": ("nan",)},
            "--lora-weights nan: expected a finite number",
        ),
        ([], {"lora_load": ("all", "some"), "save_model_type": "peft"}, "writes one adapter as it is"),
        (["--unmerge"], {"lora_load": ("all",), "save_model_type": "peft"}, "--unmerge changes a model"),
        ([], {"pad_vocab_size_to": 100}, "--pad-vocab-size-to 100 is less than the model's 101 words"),
        (
            [],
            {"pad_vocab_size_to": 130, "target_tensor_parallel_size": 4},
            "130 is not divisible by --target-tensor-parallel-size 4; the next one is 132",
        ),
        ([], {"pad_vocab_size_to": 128, "save_model_type": "hf"}, "has the model's own vocabulary"),
    ],
)
def test_what_is_refused(
    models,
    adapters: dict[str, Path],
    tmp_path: Path,
    run_convert,
    words: list[str],
    flags: dict[str, Any],
    message: str,
):
    given = {"load_dir": models("llama").path, "save_dir": tmp_path / "out", "save_model_type": "mg", **flags}
    if "lora_load" in given:
        given["lora_load"] = tuple(adapters[name] for name in given["lora_load"])
    with pytest.raises(Refused, match=message):
        run_convert(*words, **given)
    assert not (tmp_path / "out").exists()
