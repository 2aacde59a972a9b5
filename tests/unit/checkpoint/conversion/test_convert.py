"""convert_ckpt.py's function end to end: every mode, what lies in the target, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.checkpoint.peft.plan import plan_adapter
from mindspeed_lora.checkpoint.source import open_source
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.errors import Refused
from tests.support.adapters import ALL, new_adapter, write

Convert = Callable[..., None]
TO_MG = {"load_model_type": "hf", "save_model_type": "mg"}
TO_HF = {"load_model_type": "mg", "save_model_type": "hf"}
MG_TO_MG = {"load_model_type": "mg", "save_model_type": "mg"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def save_folder(models, tmp_path: Path) -> Path:
    """A training job's --save folder with an adapter on the untied Llama."""
    shape = shape_of(models("llama").path)
    folder = tmp_path / "save" / "iter_0000020" / "adapter"
    write(folder, shape, new_adapter(shape), base_model_name=str(models("llama").path))
    (tmp_path / "save" / "latest_checkpointed_iteration.txt").write_text("20")
    (folder / "chat_template.jinja").write_text("trained")
    return tmp_path / "save"


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_hf_to_mg_to_hf_is_bit_identical(model, tmp_path: Path, run_convert: Convert, tp: int, pp: int):
    mg, out = tmp_path / "mg", tmp_path / "out"
    run_convert(
        load_dir=model.path,
        save_dir=mg,
        target_tensor_parallel_size=tp,
        target_pipeline_parallel_size=pp,
        **TO_MG,
    )
    assert len(list(mg.glob("iter_0000001/mp_rank_*"))) == tp * pp
    run_convert(load_dir=mg, save_dir=out, **TO_HF)
    assert_equal(weights(out / "mg2hf"), model.tensors)
    kept = json.loads((mg / "hf_config" / "source.json").read_text())
    assert kept == {"path": str(model.path), "hub_id": None, "revision": None}
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / "mg2hf" / name).read_text() == (model.path / name).read_text()
    with torch.no_grad():
        tokens = torch.arange(10)[None]
        again = type(model)("", out / "mg2hf").load()
        assert torch.equal(again(tokens).logits, model.load()(tokens).logits)


def test_reshard(model, tmp_path: Path, run_convert: Convert):
    one, two, out = (tmp_path / name for name in ("one", "two", "out"))
    run_convert(load_dir=model.path, save_dir=one, target_tensor_parallel_size=4, **TO_MG)
    run_convert(load_dir=one, save_dir=two, target_pipeline_parallel_size=4, **MG_TO_MG)
    run_convert(load_dir=two, save_dir=out, **TO_HF)
    assert_equal(weights(out / "mg2hf"), model.tensors)
    source, first = open_source(two), open_source(model.path)
    assert source.hf_origin == str(model.path)
    assert source.shape == first.shape


def test_original_model_as_save_dir_is_not_touched(models, own_model, tmp_path: Path, run_convert: Convert):
    mg = tmp_path / "mg"
    run_convert(load_dir=own_model.path, save_dir=mg, **TO_MG)
    shutil.rmtree(mg / "hf_config")
    before = snapshot(own_model.path)
    run_convert(load_dir=mg, save_dir=own_model.path, model_type="GPT", **TO_HF)
    assert_equal(weights(own_model.path / "mg2hf"), own_model.tensors)
    shutil.rmtree(own_model.path / "mg2hf")
    assert snapshot(own_model.path) == before


def test_where_the_configuration_comes_from(models, tmp_path: Path, run_convert: Convert):
    model, mg = models("llama"), tmp_path / "mg"
    run_convert(load_dir=model.path, save_dir=mg, **TO_MG)
    marked = {}
    for place in ("given", "save", "kept"):
        folder = {"given": tmp_path / "given", "save": tmp_path / "save", "kept": mg / "hf_config"}[place]
        folder.mkdir(exist_ok=True)
        config = json.loads((model.path / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "from": place}))
        marked[place] = folder

    def came_from(save_dir: Path, **flags: Any) -> str:
        run_convert("--overwrite", load_dir=mg, save_dir=save_dir, **TO_HF, **flags)
        place: str = json.loads((save_dir / "mg2hf" / "config.json").read_text())["from"]
        return place

    assert came_from(marked["save"], hf_cfg_dir=marked["given"]) == "given"
    assert came_from(marked["save"]) == "save"
    assert came_from(tmp_path / "new") == "kept"
    shutil.rmtree(mg / "hf_config")
    with pytest.raises(Refused, match="configuration of the Hugging Face model is unknown"):
        run_convert("--overwrite", load_dir=mg, save_dir=tmp_path / "new", **TO_HF)
    with pytest.raises(Refused, match="--hf-cfg-dir .* holds no config.json"):
        came_from(tmp_path / "new", hf_cfg_dir=tmp_path)


def test_padded_vocabulary_of_others_is_cut_by_the_configuration(
    models, tmp_path: Path, run_convert: Convert
):
    model, mg = models("llama"), tmp_path / "mg"
    run_convert(load_dir=model.path, save_dir=mg, make_vocab_size_divisible_by=64, **TO_MG)
    shutil.rmtree(mg / "hf_config")
    run_convert(load_dir=mg, save_dir=tmp_path / "out", hf_cfg_dir=model.path, **TO_HF)
    assert_equal(weights(tmp_path / "out" / "mg2hf"), model.tensors)


def test_merges_are_the_same_in_every_mode(models, tmp_path: Path, run_convert: Convert, save_folder: Path):
    from peft import PeftModel

    model = models("llama")
    expected = PeftModel.from_pretrained(model.load(), save_folder / "iter_0000020/adapter")
    merged = expected.merge_and_unload()
    lora = {"lora_load": save_folder, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ALL}
    mg = tmp_path / "mg"
    run_convert(
        load_dir=model.path,
        save_dir=mg,
        target_tensor_parallel_size=2,
        target_pipeline_parallel_size=2,
        **TO_MG,
    )
    run_convert(load_dir=mg, save_dir=tmp_path / "mg-hf", **TO_HF, **lora)
    run_convert(load_dir=mg, save_dir=tmp_path / "mg-mg", target_tensor_parallel_size=4, **MG_TO_MG, **lora)
    run_convert(load_dir=tmp_path / "mg-mg", save_dir=tmp_path / "mg-mg-hf", **TO_HF)
    run_convert(load_dir=model.path, save_dir=tmp_path / "hf-hf", save_model_type="hf", **lora)
    for name in ("mg-hf", "mg-mg-hf", "hf-hf"):
        folder = tmp_path / name / "mg2hf"
        assert_equal(weights(folder), merged.state_dict())
        assert (folder / "chat_template.jinja").read_text() == "trained"
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        logits = type(model)("", tmp_path / "hf-hf" / "mg2hf").load()(tokens).logits
        assert torch.equal(logits, merged(tokens).logits)


def test_adapter_to_peft_folder(models, tmp_path: Path, run_convert: Convert, save_folder: Path):
    source = save_folder / "iter_0000020" / "adapter"
    run_convert(
        "--save-lora-to-hf",
        "--load-checkpoint-loosely",
        load_dir=save_folder,
        save_dir=tmp_path / "out",
        lora_r=4,
        **TO_HF,
    )
    run_convert(
        load_dir=save_folder, save_dir=tmp_path / "peft", save_model_type="peft", base_model_name="org/base"
    )
    for folder in (tmp_path / "out" / "mg2hf", tmp_path / "peft"):
        found = load_file(folder / "adapter_model.safetensors")
        assert_equal(found, load_file(source / "adapter_model.safetensors"))
        assert (folder / "chat_template.jinja").exists()
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"


def test_incomplete_adapter_is_not_exported(models, tmp_path: Path, run_convert: Convert, save_folder: Path):
    folder = save_folder / "iter_0000020" / "adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "adapter_model.safetensors")
    with pytest.raises(Refused, match="has lora_A only; the adapter is incomplete"):
        run_convert(load_dir=save_folder, save_dir=tmp_path / "out", save_model_type="peft")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_r": 8}, r"--lora-r 8 \(the adapter has 4\): contradicting"),
        ({"lora_alpha": 16}, r"--lora-alpha 16 \(the adapter has 8\): contradicting"),
        (
            {"lora_target_modules": ("linear_qkv",)},
            r"--lora-target-modules linear_qkv \(the adapter is on q_proj",
        ),
    ],
)
def test_lora_flags_that_contradict(
    models, tmp_path: Path, run_convert: Convert, save_folder: Path, flags: dict[str, Any], message: str
):
    out, model = tmp_path / "out", models("llama")
    with pytest.raises(Refused, match=message):
        run_convert(load_dir=model.path, save_dir=out, save_model_type="hf", lora_load=save_folder, **flags)
    with pytest.raises(Refused, match=message):
        run_convert(load_dir=save_folder, save_dir=out, save_model_type="peft", **flags)
    assert not (out / "mg2hf").exists()


def test_lora_flags_without_an_adapter(models, tmp_path: Path, run_convert: Convert):
    with pytest.raises(Refused, match="without --lora-load"):
        run_convert(load_dir=models("llama").path, save_dir=tmp_path / "out", lora_r=8, **TO_MG)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"target_tensor_parallel_size": 3}, "--target-tensor-parallel-size 3 does not divide .*heads"),
        ({"target_tensor_parallel_size": 8}, "KV heads"),
        ({"target_pipeline_parallel_size": 3}, "--target-pipeline-parallel-size 3 does not divide"),
        ({"model_type_hf": "qwen3"}, "--model-type-hf qwen3 contradicts the checkpoint, which is a llama"),
        ({"load_model_type": "mg"}, "no Megatron checkpoint"),
        ({"num_layers": 32}, "num-layers 32"),
        ({"load_dir": "/nowhere"}, "/nowhere: no such folder"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(
    models, tmp_path: Path, run_convert: Convert, flags: dict[str, Any], message: str
):
    given = {"load_dir": models("llama").path, "save_dir": tmp_path / "out", **TO_MG, **flags}
    with pytest.raises(Refused, match=message):
        run_convert(**given)
    assert list(tmp_path.iterdir()) == []


def test_aliases_of_families_in_peoples_scripts(models, tmp_path: Path, run_convert: Convert):
    for kind, alias in (("qwen2", "llama2"), ("mistral", "llama2"), ("qwen3-tied", "qwen3")):
        run_convert(
            "--use-mcore-models",
            load_dir=models(kind).path,
            save_dir=tmp_path / kind,
            model_type_hf=alias,
            **TO_MG,
        )


def test_existing_target(models, tmp_path: Path, run_convert: Convert):
    model, mg = models("llama"), tmp_path / "mg"
    run_convert(load_dir=model.path, save_dir=mg, **TO_MG)
    before = snapshot(mg)
    with pytest.raises(Refused, match="exists and is not empty; give --overwrite"):
        run_convert(load_dir=model.path, save_dir=mg, **TO_MG)
    assert snapshot(mg) == before
    run_convert("--overwrite", load_dir=model.path, save_dir=mg, target_tensor_parallel_size=2, **TO_MG)
    assert len(list(mg.glob("iter_0000001/*"))) == 2


def test_a_target_that_would_delete_its_input(own_model, tmp_path: Path, run_convert: Convert):
    run_convert(load_dir=own_model.path, save_dir=tmp_path / "mg", **TO_MG)
    with pytest.raises(Refused, match="--load-dir .* lies in the folder to be written"):
        run_convert(
            "--overwrite", load_dir=tmp_path / "mg/iter_0000001", save_dir=tmp_path / "mg", **MG_TO_MG
        )
    with pytest.raises(Refused, match="--load-dir .* lies in the folder to be written"):
        run_convert("--overwrite", load_dir=own_model.path, save_dir=tmp_path, **TO_MG)


def test_dtype(models, tmp_path: Path, run_convert: Convert):
    model = models("llama")
    run_convert(load_dir=model.path, save_dir=tmp_path, save_model_type="hf", params_dtype="bf16")
    found = weights(tmp_path / "mg2hf")
    assert_equal(found, {name: tensor.bfloat16() for name, tensor in model.tensors.items()})
    assert json.loads((tmp_path / "mg2hf" / "config.json").read_text())["dtype"] == "bfloat16"
    run_convert(load_dir=model.path, save_dir=tmp_path / "mg", params_dtype="fp16", **TO_MG)
    assert open_source(tmp_path / "mg").shape.params_dtype == "float16"


def test_values_that_are_not_finite_are_copied_and_told(
    own_model, tmp_path: Path, run_convert: Convert, capsys
):
    tensors = own_model.tensors
    tensors["model.norm.weight"][3] = float("nan")
    tensors["lm_head.weight"][0, :2] = float("inf")
    save_file(tensors, own_model.path / "model.safetensors", {"format": "pt"})
    run_convert(load_dir=own_model.path, save_dir=tmp_path / "mg", **TO_MG)
    output = capsys.readouterr()
    assert "warning: 3 NaN or infinite values in 2 tensors" in output.err
    assert f"wrote {tmp_path / 'mg'}: 27 tensors" in output.out
    found = open_source(tmp_path / "mg").read("decoder.final_layernorm.weight")
    assert found[3].isnan()


def test_a_failure_leaves_nothing_behind(models, tmp_path: Path, run_convert: Convert, monkeypatch):
    from mindspeed_lora.checkpoint.storage.tensor_writer import TensorWriter

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        run_convert(load_dir=models("llama").path, save_dir=tmp_path / "mg", **TO_MG)
    assert list(tmp_path.iterdir()) == []


def test_everything_that_an_adapter_can_hold_is_exported(models, tmp_path: Path, run_convert: Convert):
    shape = shape_of(models("llama-biased").path)
    flags: dict[str, Any] = {"lora_bias": "all", "lora_modules_to_save": ("norm", "output_layer")}
    # Sorted, the second key would come first, and take layer 1's v_proj.
    flags |= {"lora_rank_pattern": {"v_proj": 2, r"layers\.1\..*": 3}, "use_rslora": True}
    flags |= {"lora_layers_to_transform": (1, 2)}
    lora = LoraConfig(lora_r=4, lora_alpha=8, lora_target_modules=("q_proj", "v_proj", "linear_fc1"), **flags)
    plan = plan_adapter(lora, shape, 1, new_tokens=(shape.vocab_size, 5))
    assert plan is not None
    write(tmp_path / "in", plan.shape, plan, base_model_name=str(models("llama-biased").path))
    config = json.loads((tmp_path / "in" / "adapter_config.json").read_text())
    assert list(config["rank_pattern"]) == list(flags["lora_rank_pattern"]) and list(config) == sorted(config)
    given = {name: value for name, value in flags.items() if name not in ("use_rslora", "lora_rank_pattern")}
    given["lora_target_modules"] = ("linear_fc1", "q_proj", "v_proj")
    run_convert(
        "--use-rslora", load_dir=tmp_path / "in", save_dir=tmp_path / "out", save_model_type="peft", **given
    )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    with pytest.raises(Refused, match="--lora-modules-to-save embed_tokens .the adapter has"):
        run_convert(
            load_dir=tmp_path / "in",
            save_dir=tmp_path / "other",
            save_model_type="peft",
            lora_modules_to_save="embed_tokens",
        )


def test_tensors_that_an_adapter_does_not_mean(save_folder: Path, tmp_path: Path, run_convert: Convert):
    file = save_folder / "iter_0000020" / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.model.norm.weight": torch.ones(32)}, file)
    with pytest.raises(
        Refused, match="model.norm.weight is no LoRA factor of a linear, nor does modules_to_save"
    ):
        run_convert(load_dir=save_folder, save_dir=tmp_path / "out", save_model_type="peft")
