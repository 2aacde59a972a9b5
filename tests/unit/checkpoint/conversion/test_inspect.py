"""inspect: what folders of every format are, as text and JSON, without reading a weight; damaged ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mindspeed_lora.checkpoint.conversion.inspect import describe_folder
from mindspeed_lora.checkpoint.storage import safetensors_file

ROOT = Path(__file__).parents[4]


def refuse_to_read(*_: object) -> None:
    raise AssertionError("weights were read")


def look(folder: Path, with_tensors: bool = False) -> dict[str, Any]:
    """The report of a folder, for which no tensor's bytes may be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_file, "read_at", refuse_to_read)
        return describe_folder(folder, with_tensors)


def parameters_of(model: Any) -> int:
    return sum({id(p): p.numel() for p in model.parameters()}.values())


def test_a_hugging_face_model(model) -> None:
    live = model.load()
    report = look(model.path, with_tensors=True)
    found, config = report["model"], live.config
    assert report["format"] == found["format"] == "hf"
    assert found["family"] == config.model_type
    assert found["parameters"] == parameters_of(live)
    assert found["tied_embeddings"] == bool(config.tie_word_embeddings)
    assert (found["num_layers"], found["hidden_size"]) == (config.num_hidden_layers, config.hidden_size)
    assert list(found["dtypes"]) == [str(live.dtype).removeprefix("torch.")]
    assert report["bytes"] == sum(path.stat().st_size for path in model.path.iterdir())
    parts = {part["name"]: tuple(part["shape"]) for one in report["tensors"] for part in one["parts"]}
    assert parts == {name: tuple(tensor.shape) for name, tensor in model.tensors.items()}
    assert report["adapter"] is report["run"] is found["layout"] is None


def test_megatron_layouts_are_told_with_their_stages(models, tmp_path: Path, run_convert) -> None:
    mg = tmp_path / "mg"
    run_convert(
        load_dir=models("llama").path,
        save_dir=mg,
        save_model_type="mg",
        target_tensor_parallel_size=2,
        target_pipeline_parallel_size=2,
        num_layer_list="1,4",
        noop_layers="2",
        make_vocab_size_divisible_by=8,
    )
    report = look(mg, with_tensors=True)
    found = report["model"]
    assert (report["format"], found["iteration"]) == ("mg", 1)
    assert found["layout"] == {
        **{"tp": 2, "pp": 2, "vpp": 1, "ep": 1, "etp": 2},
        **{"stages": [[[0]], [[1, 2, 3]]], "noop_layers": [2]},
    }
    assert (found["vocab_size"], found["padded_vocab_size"]) == (101, 112)
    assert found["origin"] == {"path": str(models("llama").path), "hub_id": None, "revision": None}
    last = next(one for one in report["tensors"] if one["name"] == "decoder.layers.3.mlp.linear_fc2.weight")
    assert last["shape"] == [32, 48]
    assert last["parts"] == [
        {
            "name": last["name"],
            "file": f"iter_0000001/mp_rank_0{rank}_001/model_optim_rng.pt",
            "shape": [32, 24],
        }
        for rank in range(2)
    ]
    assert look(mg / "hf_config")["format"] == "hf_config"
    assert look(mg / "hf_config")["model"]["parameters"] == found["parameters"]


def test_virtual_stages(models, tmp_path: Path, run_convert, command) -> None:
    run_convert(
        load_dir=models("qwen3-tied").path,
        save_dir=tmp_path / "mg",
        save_model_type="mg",
        target_pipeline_parallel_size=2,
        num_layers_per_virtual_pipeline_stage=1,
    )
    layout = look(tmp_path / "mg")["model"]["layout"]
    assert (layout["vpp"], layout["stages"]) == (2, [[[0], [2]], [[1], [3]]])
    text = command("inspect", tmp_path / "mg").out
    assert "TP 1 × PP 2 × VPP 2" in text
    assert "0 and 2, 1 and 3" in text


def test_a_training_folder_tells_all_that_it_holds(trained: Path, tiny, command) -> None:
    report = look(trained)
    run = report["run"]
    assert report["format"] == "run"
    assert (run["iteration"], run["iterations"]) == (2, [1, 2])
    assert run["data"] == {"samples": 4, "documents": 12, "seed": 1234, "global_batch_size": 2}
    holds = run["holds"]
    assert holds["adapter"] and holds["model"] and holds["random_states"] == 1
    assert holds["optimizer"]["states"] == ["exp_avg", "exp_avg_sq", "master"]
    state = load_file(next((trained / "iter_0000002" / "optimizer").iterdir()))
    masters = sum(tensor.numel() for name, tensor in state.items() if name.endswith("|master"))
    assert holds["optimizer"]["parameters"] == masters
    assert report["model"]["format"] == "mg"
    assert report["adapter"]["r"] == 4
    older = look(trained / "iter_0000001")["run"]
    assert (older["iteration"], older["data"]["samples"]) == (1, 2)
    text = command("inspect", trained).out
    assert "also held: 1" in text and "exp_avg, exp_avg_sq, master" in text


def test_an_adapter_by_peft_and_its_vllm_line(peft_adapter, models) -> None:
    folder = peft_adapter()
    saved = load_file(folder / "adapter_model.safetensors")
    report = look(folder, with_tensors=True)
    adapter = report["adapter"]
    assert report["format"] == "peft"
    assert (adapter["r"], adapter["lora_alpha"], adapter["scaling"], adapter["ranks"]) == (
        4,
        8,
        2.0,
        {"4": 8},
    )
    assert sorted(adapter["target_modules"]) == ["down_proj", "q_proj"]
    assert adapter["parameters"] == sum(tensor.numel() for tensor in saved.values())
    assert {one["name"]: tuple(one["shape"]) for one in report["tensors"]} == {
        name: tuple(tensor.shape) for name, tensor in saved.items()
    }
    assert adapter["vllm"] == {
        "loads": True,
        "reasons": [],
        "max_lora_rank": 8,
        "command": f"vllm serve {models('llama').path} --enable-lora --lora-modules mine={folder} --max-lora-rank 8",
    }


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"use_dora": True}, "use_dora is true; vLLM does not support DoRA"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"rank_pattern": {"q_proj": 2}}, "scales 4 of 8 modules otherwise"),
        ({"r": 600}, "rank 600 is above 512"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
    ],
)
def test_what_vllm_does_not_load(peft_adapter, values: dict[str, Any], reason: str) -> None:
    vllm = look(peft_adapter("llama-biased", **values))["adapter"]["vllm"]
    assert not vllm["loads"] and vllm["command"] is None
    assert any(reason in one for one in vllm["reasons"]), vllm["reasons"]


@pytest.mark.parametrize(
    ("values", "largest"),
    [
        ({"use_rslora": True, "r": 9}, 16),
        ({"rank_pattern": {"q_proj": 40}, "alpha_pattern": {"q_proj": 80}}, 64),
        ({"r": 257}, 320),
        ({"r": 1}, 1),
        ({"target_modules": ["q_proj", "lm_head"]}, 8),
    ],
)
def test_what_vllm_loads(peft_adapter, values: dict[str, Any], largest: int) -> None:
    vllm = look(peft_adapter(**values))["adapter"]["vllm"]
    assert (vllm["loads"], vllm["max_lora_rank"]) == (True, largest), vllm["reasons"]


def test_json_and_text_tell_the_same(peft_adapter, command) -> None:
    folder = peft_adapter(modules_to_save=["lm_head"])
    told = command("inspect", folder, "--json", "--tensors")
    assert told.status == 0
    assert json.loads(told.out) == look(folder, with_tensors=True)
    text = command("inspect", folder, "--tensors").out
    assert "r 4, alpha 8: scaling 2" in text
    assert "does not load it: " in text and "modules_to_save is ['lm_head']" in text
    assert "lora_A.weight  [4, 32]" in text


def truncate(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])


def lie_in_the_index(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    weight_map["model.layers.9.lie"] = "model-00001-of-00001.safetensors"
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def remove_weights_of_one(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate, "it is truncated"),
        (lie_in_the_index, "tensor model.layers.9.lie should be in model-00001"),
        (remove_weights_of_one, "tensors are missing from the weight files: model.layers.2.mlp.up_proj"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
    ],
)
def test_damaged_models_are_one_sentence(own_model, command, damage, sentence: str) -> None:
    damage(own_model.path)
    outcome = command("inspect", own_model.path)
    assert (outcome.status, outcome.out) == (2, "")
    assert sentence in outcome.refusal


def test_other_damaged_folders_are_one_sentence(models, tmp_path, peft_adapter, run_convert, command) -> None:
    mg = tmp_path / "mg"
    run_convert(
        load_dir=models("llama").path, save_dir=mg, save_model_type="mg", target_tensor_parallel_size=2
    )
    shutil.rmtree(mg / "iter_0000001" / "mp_rank_01")
    assert "rank folders are missing" in command("inspect", mg).refusal
    adapter = peft_adapter()
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert "q_proj has lora_B only; the adapter is incomplete" in command("inspect", adapter).refusal
    (adapter / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors: the file is missing" in command("inspect", adapter).refusal
    assert "no such folder" in command("inspect", tmp_path / "nothing").refusal
    assert "is a file; give its folder" in command("inspect", models("llama").path / "config.json").refusal
    (tmp_path / "empty").mkdir()
    assert "neither a Hugging Face model" in command("inspect", tmp_path / "empty").refusal


def test_a_real_process(models, tmp_path: Path) -> None:
    """Exit status and streams of the very script."""

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "convert_ckpt.py", *words]
        return subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True)

    good = run("inspect", models("llama").path)
    assert (good.returncode, good.stderr) == (0, "")
    assert "what it is  Hugging Face model" in good.stdout
    bad = run("inspekt", models("llama").path)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: unexpected word 'inspekt'; did you mean 'convert_ckpt.py inspect'?\n"
    printed = run("inspect", "nowhere", "--print-config")
    assert printed.returncode == 0 and "dir: nowhere" in printed.stdout
    assert list(tmp_path.iterdir()) == []
