"""Conversions with quantised weights: against transformers + bitsandbytes, through any layout, merges, refusals."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_lora.checkpoint.canonical import adapter_linears, expert_number
from mindspeed_lora.checkpoint.conversion.inspect import describe_folder
from mindspeed_lora.checkpoint.source import Source, open_source
from mindspeed_lora.checkpoint.storage.tensor_writer import TensorWriter
from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES
from mindspeed_lora.quantization.matrix import dequantize, quantize
from tests.support.moe_models import moe_model
from tests.support.training import train
from tests.unit.checkpoint.conversion.test_expert_conversion import random_layout

Convert = Callable[..., None]
NF4 = ("--qlora-nf4", "--quant-double")


def quantised_by_transformers(folder: Path, target: Path, **config: Any) -> Path:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    given = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **config}
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**given), dtype="auto"
    )
    model.save_pretrained(target)
    return target


def assert_same_matrices(found: Source, expected: Source) -> None:
    """The same weights quantised, with the same codes and statistics; all others plain with the same bits."""
    assert found.quantization == expected.quantization
    for name in expected.names():
        assert found.is_quantized(name) == expected.is_quantized(name), name
        assert found.dtype(name) == expected.dtype(name)
        if not expected.is_quantized(name):
            assert torch.equal(found.read(name), expected.read(name)), name
            continue
        for one, two in zip(found.quantized(name) or [], expected.quantized(name) or [], strict=True):
            assert (one.settings, one.shape, one.dtype) == (two.settings, two.shape, two.dtype)
            assert torch.equal(one.packed, two.packed) and torch.equal(one.absmax, two.absmax), name
            assert torch.equal(dequantize(one, one.dtype), dequantize(two, two.dtype)), name


@pytest.mark.parametrize(
    ("kind", "words", "config"),
    [
        (
            "llama-tied",
            NF4,
            {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16},
        ),
        ("llama", ("--qlora", "--quant-type", "fp4"), {"bnb_4bit_quant_type": "fp4"}),
        ("mistral", ("--qlora", "--quant-type", "int8"), {"load_in_4bit": False, "load_in_8bit": True}),
        (
            "qwen2",
            (*NF4, "--quant-skip-modules", "o_proj", "model.layers.1.mlp.down_proj"),
            {
                "bnb_4bit_use_double_quant": True,
                "llm_int8_skip_modules": ["lm_head", "o_proj", "model.layers.1.mlp.down_proj"],
            },
        ),
    ],
)
def test_folder_is_the_one_of_transformers(
    models, run_convert: Convert, tmp_path: Path, kind: str, words: tuple[str, ...], config: dict[str, Any]
) -> None:
    """The same tensors as transformers writes when it quantises, and it loads them to the same values and logits."""
    from transformers import AutoModelForCausalLM

    expected = quantised_by_transformers(models(kind).path, tmp_path / "theirs", **config)
    run_convert(*words, load_dir=models(kind).path, save_dir=tmp_path / "ours", save_model_type="hf")
    folder = tmp_path / "ours" / "mg2hf"
    mine, theirs = (load_file(one / "model.safetensors") for one in (folder, expected))
    assert set(mine) == set(theirs)
    for name, tensor in theirs.items():
        if "quant_state" in name:
            assert json.loads(bytes(mine[name].tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name
    one, two = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, expected))
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(one(tokens).logits, two(tokens).logits)
    found = one.dequantize().state_dict()
    for name, tensor in two.dequantize().state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_other_block_sizes_are_told_by_each_weight(models, run_convert: Convert, tmp_path: Path) -> None:
    """transformers' configuration knows none, but its loader takes the one of the weight's own state."""
    from transformers import AutoModelForCausalLM

    run_convert(
        *NF4, quant_block_size=128, load_dir=models("llama").path, save_dir=tmp_path, save_model_type="hf"
    )
    source = open_source(tmp_path / "mg2hf")
    assert source.quantization == QuantSettings("nf4", 128, double=True)
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "mg2hf").dequantize().state_dict()
    plain = load_file(models("llama").path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(
        state[name], dequantize(quantize(plain[name], source.quantization, name), torch.float32)
    )


@pytest.mark.parametrize("words", [NF4, ("--qlora", "--quant-type", "int8")], ids=["nf4", "int8"])
def test_any_layout_there_and_back(
    models, run_convert: Convert, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """hf → mg at one layout → mg at another → hf: the codes and statistics of the whole matrices, bit by bit."""
    run_convert(*words, load_dir=models("llama").path, save_dir=tmp_path / "hf", save_model_type="hf")
    expected = open_source(tmp_path / "hf" / "mg2hf")
    before = models("llama").path
    for number, (tp, pp) in enumerate([(4, 1), (1, 2), (2, 2)]):
        target = tmp_path / f"mg{number}"
        run_convert(
            *words if number == 0 else ("--qlora",),
            load_dir=before,
            save_dir=target,
            save_model_type="mg",
            target_tensor_parallel_size=tp,
            target_pipeline_parallel_size=pp,
        )
        assert_same_matrices(open_source(target), expected)
        before = target
    run_convert("--qlora", load_dir=before, save_dir=tmp_path / "back", save_model_type="hf")
    assert_same_matrices(open_source(tmp_path / "back" / "mg2hf"), expected)
    plain = json.loads((before / "hf_config" / "config.json").read_text())
    assert "quantization_config" not in plain


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_experts_in_any_layout(run_convert: Convert, tmp_path: Path, kind: str) -> None:
    """Routed experts are quantised each by itself in mg, at any EP × ETP; in hf they stay plain, as in transformers."""
    folder = moe_model(kind, tmp_path / "model", torch.bfloat16)
    plain, draw = open_source(folder), random.Random(0)
    linears, family = adapter_linears(plain.shape), FAMILIES[plain.shape.family]
    settings = QuantSettings("nf4", 64, double=True)
    before = folder
    for number in range(3):
        target = tmp_path / f"mg{number}"
        words = random_layout(draw)
        run_convert(
            *words,
            *(NF4 if number == 0 else ["--qlora"]),
            load_dir=before,
            save_dir=target,
            save_model_type="mg",
        )
        before, source = target, open_source(target)
        for name in plain.names():
            if name.removesuffix(".weight") not in linears:
                assert torch.equal(source.read(name), plain.read(name)), name
                continue
            mapping, _ = family.mapping(name)
            parts = mapping.split(plain.shape, plain.read(name))
            for found, part in zip(source.quantized(name) or [], parts, strict=True):
                expected = quantize(part, settings, name)
                assert torch.equal(found.packed, expected.packed) and torch.equal(
                    found.absmax, expected.absmax
                )
    run_convert("--qlora", load_dir=before, save_dir=tmp_path / "hf", save_model_type="hf")
    written, last = open_source(tmp_path / "hf" / "mg2hf"), open_source(before)
    for name in plain.names():
        is_linear = name.removesuffix(".weight") in linears
        assert written.is_quantized(name) == (is_linear and expert_number(name) is None)
        assert torch.equal(written.read(name), last.read(name)), name


def test_dequantised_on_the_way(models, run_convert: Convert, tmp_path: Path, capsys) -> None:
    """Without --qlora the values are written, in the dtype that they had; config.json says nothing of quantising."""
    expected = quantised_by_transformers(models("llama-tied").path, tmp_path / "theirs")
    run_convert(load_dir=expected, save_dir=tmp_path / "plain", save_model_type="hf")
    assert "written dequantised; --qlora keeps it quantised" in capsys.readouterr().err
    source, stored = open_source(tmp_path / "plain" / "mg2hf"), open_source(expected)
    assert source.quantization is None
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "mg2hf" / "config.json").read_text())
    for name in source.names():
        assert source.dtype(name) == torch.bfloat16 and torch.equal(source.read(name), stored.read(name))
    run_convert(
        "--qlora-save-dequantize", load_dir=expected, save_dir=tmp_path / "again", save_model_type="hf"
    )
    assert "notice" not in capsys.readouterr().err


def test_merges(models, run_convert: Convert, peft_adapter, tmp_path: Path, capsys) -> None:
    """From the original weights by default; from the dequantised ones on demand, the difference told."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, adapter = models("llama").path, peft_adapter()
    words = {"lora_load": adapter, "save_model_type": "hf"}
    run_convert(load_dir=base, save_dir=tmp_path / "default", **words)
    run_convert("--merge-dequantized", load_dir=base, save_dir=tmp_path / "seen", **words)
    told = capsys.readouterr().out
    assert (
        "the dequantised weights differ from the original ones by at most" in told
        and "relative norm 0.0" in told
    )
    theirs = quantised_by_transformers(base, tmp_path / "theirs")
    dequantised = AutoModelForCausalLM.from_pretrained(theirs).dequantize()
    dequantised.config.quantization_config = None
    merged = PeftModel.from_pretrained(dequantised, adapter).merge_and_unload().state_dict()
    original = PeftModel.from_pretrained(models("llama").load(), adapter).merge_and_unload().state_dict()
    for folder, expected in (("seen", merged), ("default", original)):
        for name, tensor in load_file(tmp_path / folder / "mg2hf" / "model.safetensors").items():
            assert torch.equal(tensor, expected[name]), (folder, name)
    run_convert(load_dir=theirs, save_dir=tmp_path / "from4bit", **words)
    assert "merged into the values that it stands for" in capsys.readouterr().err
    for name, tensor in load_file(tmp_path / "from4bit" / "mg2hf" / "model.safetensors").items():
        assert torch.equal(tensor, merged[name]), name
    run_convert(*NF4, load_dir=base, save_dir=tmp_path / "again", **words)
    assert "the quantised weights differ from the merged ones by at most" in capsys.readouterr().out
    source, settings = open_source(tmp_path / "again" / "mg2hf"), QuantSettings("nf4", 64, double=True)
    (found,) = source.quantized("decoder.layers.2.mlp.linear_fc2.weight") or []
    expected = quantize(original["model.layers.2.mlp.down_proj.weight"], settings, "down")
    assert torch.equal(found.packed, expected.packed) and torch.equal(found.absmax, expected.absmax)


def test_merging_nothing_gives_the_dequantised_weights(
    models, run_convert: Convert, peft_adapter, tmp_path: Path
) -> None:
    """B = 0: exactly dequantise(quantise(W))."""
    adapter = shutil.copytree(peft_adapter(), tmp_path / "adapter")
    factors = load_file(adapter / "adapter_model.safetensors")
    save_file({n: t * ("lora_B" not in n) for n, t in factors.items()}, adapter / "adapter_model.safetensors")
    base = models("llama-tied").path
    run_convert(
        "--merge-dequantized",
        load_dir=base,
        lora_load=adapter,
        save_dir=tmp_path / "merged",
        save_model_type="hf",
    )
    run_convert("--qlora-nf4", load_dir=base, save_dir=tmp_path / "quantised", save_model_type="hf")
    found, expected = (open_source(tmp_path / one / "mg2hf") for one in ("merged", "quantised"))
    for name in expected.names():
        assert torch.equal(found.read(name), expected.read(name)), name


def test_what_is_refused(models, run_convert: Convert, own_model, tmp_path: Path) -> None:
    stored = quantised_by_transformers(models("llama").path, tmp_path / "theirs")
    tensors = load_file(own_model.path / "model.safetensors")
    tensors["model.layers.2.self_attn.v_proj.weight"][3, 5] = float("nan")
    save_file(tensors, own_model.path / "model.safetensors", {"format": "pt"})
    cases: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        ("v_proj.weight holds NaN or infinite", NF4, {"load_dir": own_model.path, "save_model_type": "hf"}),
        (
            "quantised already, as nf4, blocks of 64",
            ("--qlora", "--quant-type", "fp4"),
            {"save_model_type": "hf"},
        ),
        (
            "--qlora writes quantised weights, which the torch_dist",
            ("--qlora",),
            {"save_model_type": "torch_dist"},
        ),
    ]
    for message, words, flags in cases:
        with pytest.raises(Refused, match=message):
            run_convert(*words, **{"load_dir": stored, "save_dir": tmp_path / "out", **flags})
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_damaged_megatron_files_are_refused(models, run_convert: Convert, tmp_path: Path) -> None:
    run_convert(
        *NF4,
        load_dir=models("llama").path,
        save_dir=tmp_path,
        save_model_type="mg",
        target_tensor_parallel_size=2,
    )
    file = tmp_path / "iter_0000001" / "mp_rank_01" / "model_optim_rng.pt"
    (tmp_path / "checksums.json").unlink()
    whole = torch.load(file, weights_only=False)
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    for part, value, message in [
        (".absmax", None, r"fc1.weight.absmax is in 1 of 2 ranks"),
        (".absmax", torch.zeros(3, dtype=torch.uint8), r"absmax is torch.uint8 \[3\]; expected"),
        (".quant_state.bitsandbytes__nf4", None, "is in 1 of 2 ranks"),
        (".quant_state.bitsandbytes__nf4", torch.zeros(4, dtype=torch.uint8), "not valid JSON"),
        ("", torch.zeros(48, 32), r"fc1.weight is torch.float32 \[48, 32\]; expected torch.uint8"),
    ]:
        model = dict(whole["model"])
        model[f"{name}{part}"] = value
        if value is None:
            del model[f"{name}{part}"]
        torch.save({**whole, "model": model}, file)
        with pytest.raises(Refused, match=message):
            open_source(tmp_path)
    model = {one: value for one, value in whole["model"].items() if not one.startswith(f"{name}.")}
    torch.save({**whole, "model": model}, file)
    with pytest.raises(Refused, match=r"linear_fc1.weight.\w+ is in 1 of 2 ranks"):
        open_source(tmp_path)


def test_inspect_and_dry_run(models, run_convert: Convert, tmp_path: Path, capsys) -> None:
    words = (*NF4, "--target-tensor-parallel-size", "2", "--save-model-type", "mg")
    run_convert(*words, "--dry-run", load_dir=models("llama").path, save_dir=tmp_path / "mg")
    planned = capsys.readouterr().out
    assert not (tmp_path / "mg").exists()
    run_convert(*words, load_dir=models("llama").path, save_dir=tmp_path / "mg")
    for file in (tmp_path / "mg").rglob("*.pt"):
        assert f"{file.stat().st_size:,} bytes" in planned
    model = describe_folder(tmp_path / "mg", with_tensors=True)["model"]
    linears = sum(
        rows * columns for rows, columns in adapter_linears(open_source(tmp_path / "mg").shape).values()
    )
    assert model["dtypes"]["nf4"] == linears == model["quantization"]["parameters"]
    assert model["quantization"]["type"] == "nf4" and model["quantization"]["double"]


def test_resume_goes_on_and_asks_for_the_same_flags(
    models, run_convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """A conversion that broke off ends with the bytes of one that did not; other --quant-* flags start anew."""
    flags = {"load_dir": models("llama").path, "save_model_type": "hf", "max_shard_size": "6KB"}
    run_convert(*NF4, save_dir=tmp_path / "whole", **flags)
    write, left = TensorWriter.write, [60]

    def fails(self: TensorWriter, name: str, tensor: torch.Tensor, at: int | None) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        write(self, name, tensor, at)

    with monkeypatch.context() as patch:
        patch.setattr(TensorWriter, "write", fails)
        with pytest.raises(OSError, match="No space left"):
            run_convert(*NF4, "--resume", save_dir=tmp_path / "again", **flags)
    shutil.copytree(tmp_path / "again", tmp_path / "other")
    run_convert("--qlora-nf4", "--resume", save_dir=tmp_path / "other", **flags)
    assert "other flags or files; starting anew" in capsys.readouterr().err
    run_convert(*NF4, "--resume", save_dir=tmp_path / "again", **flags)
    assert "resuming the conversion" in capsys.readouterr().out
    one, two = (tmp_path / side / "mg2hf" for side in ("whole", "again"))
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in two.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)
    assert open_source(tmp_path / "other" / "mg2hf").quantization == QuantSettings("nf4")


def test_merging_the_adapter_of_a_quantised_run_tells_the_difference(
    tiny, workers, run_convert: Convert, tmp_path: Path, capsys
) -> None:
    """Merged into the original weights all the same; the difference told is the one of --merge-dequantized."""
    save, merge = tmp_path / "run", {"load_dir": tiny.model, "save_model_type": "hf"}
    workers.run(1, train, tiny.words(save=save, train_iters=1, qlora=True, quant_double=True))
    run_convert(lora_load=save, save_dir=tmp_path / "run_merged", **merge)
    told = capsys.readouterr()
    assert "trained on weights quantised as nf4, blocks of 64, nested statistics" in told.err
    run_convert(lora_load=save / "adapter", save_dir=tmp_path / "plain", **merge)
    one, two = (
        load_file(tmp_path / side / "mg2hf" / "model.safetensors") for side in ("run_merged", "plain")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in two)
    capsys.readouterr()
    run_convert("--merge-dequantized", "--quant-double", lora_load=save, save_dir=tmp_path / "seen", **merge)
    assert capsys.readouterr().out.splitlines()[-1] == told.out.splitlines()[-1]
    assert "the dequantised weights differ from the original ones by at most" in told.out
