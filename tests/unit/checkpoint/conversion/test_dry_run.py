"""--dry-run of a conversion: sizes that the real run then has, the same refusals, and not a file touched."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from mindspeed_lora.checkpoint.conversion import convert as converting

ROOT = Path(__file__).parents[4]
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
PARAMETERS_70B = 70_553_706_496
"""As transformers counts them."""


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.lstat().st_size)
        for path in [folder, *folder.rglob("*")]
    }


def planned(text: str) -> dict[str, int]:
    """Paths and bytes of the files that a dry run lists."""
    rows = re.findall(r"^  (\S+) +([\d,]+) bytes$", text, flags=re.MULTILINE)
    return {path: int(size.replace(",", "")) for path, size in rows}


@pytest.mark.parametrize(
    "words",
    [
        ["--save-model-type", "mg", "--target-tensor-parallel-size", "2"],
        ["--save-model-type", "mg", "--target-pipeline-parallel-size", "2", "--num-layer-list", "1,3"],
        ["--save-model-type", "hf", "--max-shard-size", "30KB", "--params-dtype", "bf16"],
    ],
)
def test_the_files_are_those_that_are_then_written(models, tmp_path: Path, command, words) -> None:
    target = tmp_path / "not" / "there"
    line = ["--load-dir", models("llama").path, "--save-dir", target, *words]
    before = files(tmp_path), files(models("llama").path)
    told = command(*line, "--dry-run")
    assert told.status == 0, told.error
    assert told.last == "dry run: everything checked, nothing written"
    assert (files(tmp_path), files(models("llama").path)) == before
    assert command(*line).status == 0
    written = target / "mg2hf" if "hf" in words else target
    sizes = planned(told.out)
    assert sizes == {
        str(path.relative_to(written)): path.stat().st_size
        for path in written.rglob("*")
        if path.suffix in (".pt", ".safetensors")
    }
    beside = sum(path.stat().st_size for path in written.rglob("*") if path.is_file()) - sum(sizes.values())
    about = float(re.search(r"beside them +about ([\d.]+) kB", told.out)[1]) * 1000
    assert abs(about - beside) < 0.2 * beside + 3000


def test_a_merge_is_planned_with_the_adapter(models, tmp_path: Path, command, peft_adapter) -> None:
    line = ["--load-dir", models("llama").path, "--save-dir", tmp_path / "out", "--save-model-type", "hf"]
    told = command(*line, "--lora-load", peft_adapter(), "--dry-run")
    assert told.status == 0 and "model.safetensors" in planned(told.out)
    missing = command(*line, "--lora-load", tmp_path / "later", "--dry-run")
    assert missing.status == 0 and "later is not there: planned without an adapter" in missing.error
    assert planned(missing.out) == planned(told.out)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_planned(peft_adapter, tmp_path: Path, command) -> None:
    adapter = peft_adapter()
    told = command(
        *("--load-dir", adapter, "--save-dir", tmp_path / "out", "--save-model-type", "peft", "--dry-run")
    )
    assert told.status == 0, told.error
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert planned(told.out) == {"adapter_model.safetensors": size}
    assert list(tmp_path.iterdir()) == []


def test_70b_from_its_configuration_alone(tmp_path: Path, command) -> None:
    (tmp_path / "70b").mkdir()
    (tmp_path / "70b" / "config.json").write_text(json.dumps(LLAMA_70B))
    before = files(tmp_path)
    layout = ["--target-tensor-parallel-size", "8", "--target-pipeline-parallel-size", "8"]
    told = command(
        *("--load-dir", tmp_path / "70b", "--save-dir", tmp_path / "mg", "--save-model-type", "mg"),
        *(*layout, "--dry-run", "--workers", "2"),
    )
    assert told.status == 0
    assert "holds no weights: planned from its config.json" in told.error
    total = int(re.search(r"in 64 files \(([\d,]+) bytes\)", told.out)[1].replace(",", ""))
    # Norms lie on every tensor-parallel rank; each of 64 files has headers of some kilobytes.
    assert 0 < total - 2 * PARAMETERS_70B < 64 * 1_000_000
    largest = 128256 * 8192 * 2
    assert f"at most {(4 * largest + 3e8) / 1e9:.2f} GB above" in told.out
    assert told.last == "dry run: planned without the weights, nothing written"
    assert files(tmp_path) == before
    other = command(
        *("--load-dir", tmp_path / "soon", "--hf-cfg-dir", tmp_path / "70b", "--save-dir", tmp_path / "hf"),
        *("--save-model-type", "hf", "--load-model-type", "mg", "--dry-run"),
    )
    assert other.status == 0 and "soon is not there: planned from" in other.error


def test_shape_flags_suffice(tmp_path: Path, command) -> None:
    line = ["--load-dir", tmp_path / "soon", "--save-dir", tmp_path / "mg", "--save-model-type", "mg"]
    shape = "--num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 8 --vocab-size 101"
    shape += " --max-position-embeddings 64 --untie-embeddings-and-output-weights"
    told = command(*line, *shape.split(), "--dry-run")
    assert told.status == 0, told.error
    assert "soon is not there: planned from the shape flags" in told.error
    unknown = command(*line, "--dry-run")
    assert unknown.status == 0 and "soon is not there" in unknown.error
    assert unknown.last == "dry run: flags checked, nothing read, nothing written"


def test_the_refusals_are_those_of_the_real_run(models, own_model, tmp_path: Path, command) -> None:
    model, taken = models("llama").path, tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("1")
    damaged = shutil.copytree(own_model.path, tmp_path / "damaged")
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    before = files(tmp_path)
    for words in (
        ("--load-dir", model, "--save-dir", taken, "--save-model-type", "mg"),
        ("--load-dir", damaged, "--save-dir", tmp_path / "new", "--save-model-type", "mg"),
        ("--load-dir", model, "--save-dir", tmp_path / "new", "--target-tensor-parallel-size", 3),
        ("--load-dir", model, "--save-dir", tmp_path / "new", "--save-model-type", "mg", "--num-layers", 5),
    ):
        words = words if "--save-model-type" in words else (*words, "--save-model-type", "mg")
        dry = command(*words, "--dry-run")
        assert dry.status == 2
        assert dry.refusal == command(*words).refusal
    assert files(tmp_path) == before


def test_a_full_disk_is_refused_by_both(models, tmp_path: Path, command, monkeypatch) -> None:
    usage = namedtuple("usage", ("total", "used", "free"))
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda place: usage(10**6, 10**6 - 1000, 1000))
    line = ("--load-dir", models("llama").path, "--save-dir", tmp_path / "out", "--save-model-type", "mg")
    dry, real = command(*line, "--dry-run"), command(*line)
    assert (dry.status, real.status) == (2, 2)
    assert "1.0 kB free at" in dry.out and "does not hold it" in dry.out
    for outcome in (dry, real):
        assert re.search(r"\d+\.\d kB would be written, but its disk has 1\.0 kB free", outcome.refusal)
    assert list(tmp_path.iterdir()) == []


def test_a_real_process_leaves_nothing(models, tmp_path: Path) -> None:
    words = (
        "--load-dir",
        models("llama").path,
        "--save-dir",
        "new/out",
        "--save-model-type",
        "mg",
        "--dry-run",
    )
    command = [sys.executable, ROOT / "convert_ckpt.py", *words]
    told = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (0, "")
    assert "would write new/out" in told.stdout
    assert list(tmp_path.iterdir()) == []
