"""``--family-file``: a family that the package does not know converts both ways; a bad file is refused by key."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mindspeed_lora.checkpoint.conversion.convert import convert
from mindspeed_lora.config.commands import parse
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES
from mindspeed_lora.models.families.family_file import custom_family, read_family

OURS, THEIRS = "decoder.layers.{layer}", "net.blocks.{layer}"
FAMILY: dict[str, Any] = {
    "name": "nordlicht",
    "model_type": "nordlicht_v1",
    "architectures": ["NordlichtForCausalLM"],
    "base": "llama",
    "config_keys": {"num_hidden_layers": "depth", "vocab_size": "n_words"},
    "shape": {"add_qkv_bias": True},
    "features": {"position_embedding_type": "alibi"},
    "table": [
        {"canonical": "embedding.word_embeddings.weight", "hf": "net.words.weight"},
        {
            "canonical": f"{OURS}.self_attention.linear_qkv.weight",
            "hf": [f"{THEIRS}.attn.qkv.weight"],
            "kind": "packed_qkv",
        },
        {"canonical": f"{OURS}.self_attention.linear_proj.weight", "hf": f"{THEIRS}.attn.out.weight"},
        {
            "canonical": f"{OURS}.mlp.linear_fc1.weight",
            "hf": [f"{THEIRS}.mlp.g.weight", f"{THEIRS}.mlp.u.weight"],
            "kind": "gate_up",
        },
        {"canonical": f"{OURS}.mlp.linear_fc2.weight", "hf": f"{THEIRS}.mlp.d.weight"},
        {"canonical": f"{OURS}.input_layernorm.weight", "hf": f"{THEIRS}.n1.weight"},
        {"canonical": f"{OURS}.pre_mlp_layernorm.weight", "hf": f"{THEIRS}.n2.weight"},
    ],
    "ignored": [r"net\.slopes"],
}


def written(folder: Path, values: dict[str, Any], suffix: str = "json") -> Path:
    path = folder / f"family.{suffix}"
    path.write_text(json.dumps(values) if suffix == "json" else yaml.safe_dump(values))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two layers of hidden 8, four heads over two groups of width 2."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "model_type": "nordlicht_v1",
        "architectures": ["NordlichtForCausalLM"],
        "hidden_size": 8,
        "intermediate_size": 12,
        "depth": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "n_words": 11,
        "max_position_embeddings": 16,
    }
    (folder / "config.json").write_text(json.dumps(config))
    sizes: dict[str, tuple[int, ...]] = {
        "net.words.weight": (11, 8),
        "net.slopes": (4,),
        "model.norm.weight": (8,),
        "lm_head.weight": (11, 8),
    }
    for layer in range(2):
        prefix = f"net.blocks.{layer}."
        sizes |= {
            f"{prefix}attn.qkv.weight": (16, 8),
            f"{prefix}attn.qkv.bias": (16,),
            f"{prefix}attn.out.weight": (8, 8),
            f"{prefix}mlp.g.weight": (12, 8),
            f"{prefix}mlp.u.weight": (12, 8),
            f"{prefix}mlp.d.weight": (8, 12),
            f"{prefix}n1.weight": (8,),
            f"{prefix}n2.weight": (8,),
        }
    save_file({name: torch.randn(size) for name, size in sizes.items()}, folder / "model.safetensors")
    return folder


ROOT = Path(__file__).resolve().parents[4]


def run(**flags: object) -> None:
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    job = parse("convert", words)
    with custom_family(job.runtime.family_file):
        convert(job)


def test_every_command_knows_the_family(model: Path, tmp_path: Path):
    file = written(tmp_path, FAMILY, "json")
    run(load_dir=model, save_dir=tmp_path / "mg", save_model_type="mg", family_file=file)
    words = {"inspect": [str(model)], "verify": [str(model), str(tmp_path / "mg")]}
    for command, given in words.items():
        script = [sys.executable, "convert_ckpt.py", command, *given, "--family-file", str(file)]
        ended = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert "nordlicht" in ended.stdout


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_round_trip(model: Path, tmp_path: Path, suffix: str):
    file, known = written(tmp_path, FAMILY, suffix), set(FAMILIES)
    cut = {"target_tensor_parallel_size": 2, "target_pipeline_parallel_size": 2}
    mg, out = tmp_path / "mg", tmp_path / "out"
    run(load_dir=model, save_dir=mg, save_model_type="mg", family_file=file, **cut)
    run(load_dir=mg, save_dir=out, save_model_type="hf", family_file=file, model_type_hf="nordlicht")
    found, given = (load_file(path / "model.safetensors") for path in (out / "mg2hf", model))
    del given["net.slopes"]
    assert set(found) == set(given)
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())
    assert set(FAMILIES) == known
    with pytest.raises(Refused, match="model_type 'nordlicht_v1' is not supported.*--family-file"):
        run(load_dir=model, save_dir=tmp_path / "other", save_model_type="mg")


def test_what_it_computes_is_told(tmp_path: Path, model: Path):
    config = json.loads((model / "config.json").read_text())
    with custom_family(written(tmp_path, FAMILY)):
        shape = FAMILIES["nordlicht"].shape(config)
    assert (shape.family, shape.num_layers, shape.vocab_size) == ("nordlicht", 2, 11)
    assert shape.features == (("position_embedding_type", "alibi"),)


def row(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda family: family["table"][1].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("name"), "name: found nothing; expected text"),
        (lambda f: f.update(nmae="x"), "nmae: found an unknown key; expected name, model_type"),
        (lambda f: f.update(name="llama"), "name: found llama .*; expected a family that is not there yet"),
        (lambda f: f.update(model_type="phi3"), r"found nordlicht \(model_type phi3\)"),
        (lambda f: f.update(architectures="A"), "architectures: found 'A'; expected a list"),
        (lambda f: f.update(architectures=[]), r"architectures: found \[\]; expected a list of names"),
        (lambda f: f.update(base="lama"), "base: found 'lama'; expected one of llama, mistral"),
        (lambda f: f.update(config_keys={"a": 1}), "config_keys.a: found 1; expected text"),
        (lambda f: f.update(shape={"add_qkv_bias": "no"}), "shape.add_qkv_bias: found 'no'; expected true"),
        (lambda f: f.update(shape={"bias": True}), "shape.bias: found 'bias'; expected one of add_qkv_bias"),
        (lambda f: f.update(features={"magic": 1}), "features.magic: found 'magic'; expected one of"),
        (row(kind="qvk"), r"table\[1\].kind: found 'qvk'; expected one of direct, gate_up"),
        (row(kind="qkv"), r"table\[1\].hf: found .*; expected 3 tensor name\(s\) for kind qkv"),
        (row(canonical="decoder.layers.{layer}.qkv"), r"table\[1\].canonical: found .*; expected one of"),
        (
            row(hf="net.blocks.0.attn.qkv"),
            r"table\[1\].hf: found net.blocks.0.attn.qkv; expected the placehold",
        ),
        (row(bias=True), r"table\[1\]: found .*; expected an object with canonical, hf and kind"),
        (lambda f: f["table"].append(f["table"][0]), r"table\[7\].canonical: found .* again"),
        (lambda f: f.update(ignored=["("]), "ignored: found '\\('; expected a regular expression"),
    ],
)
def test_a_bad_file_is_refused_by_key(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str):
    values = json.loads(json.dumps(FAMILY))
    change(values)
    path = written(tmp_path, values)
    with pytest.raises(Refused, match=message) as error:
        read_family(path)
    assert str(error.value).startswith(f"--family-file {path}: ")


def test_a_file_that_is_none(tmp_path: Path):
    for text, message in (("{", "not valid JSON"), ("[]", "found list; expected an object")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(Refused, match=message):
            read_family(tmp_path / "bad.json")
    (tmp_path / "bad.yaml").write_text("name: !!python/object/apply:os.getcwd []")
    with pytest.raises(Refused, match="not valid YAML"):
        read_family(tmp_path / "bad.yaml")
    with pytest.raises(Refused, match="cannot be read"):
        read_family(tmp_path / "none.json")
