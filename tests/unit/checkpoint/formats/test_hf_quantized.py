"""Folders that transformers quantised with bitsandbytes, against what these load from them; and damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_lora.checkpoint.formats.hf import HfSource
from mindspeed_lora.errors import Refused

WAYS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "nf4-skipped": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": ["lm_head", "o_proj"],
    },
}
QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a way of quantising, made by transformers and bitsandbytes once."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    built: dict[str, Path] = {}

    def get(way: str) -> Path:
        if way not in built:
            folder = models("llama-tied" if way == "nf4-double" else "llama").path
            config = BitsAndBytesConfig(**WAYS[way])
            model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype="auto")
            built[way] = tmp_path_factory.mktemp("quantised") / way
            model.save_pretrained(built[way])
        return built[way]

    return get


@pytest.mark.parametrize("way", WAYS)
def test_values_are_those_of_bitsandbytes(folders: Callable[[str], Path], way: str) -> None:
    """Bit for bit, whole and by rows and columns; blocks of 64 run over rows of 32 and 48."""
    from transformers import AutoModelForCausalLM

    source = HfSource(folders(way))
    expected = AutoModelForCausalLM.from_pretrained(folders(way)).dequantize().state_dict()
    assert source.quantization is not None and source.quantization.kind == way.partition("-")[0]
    for name in source.names():
        mapping, layer = source.family.mapping(name)
        whole = mapping.join(
            source.shape, [expected[one].to(source.dtype(name)) for one in mapping.names(layer)]
        )
        assert torch.equal(source.read(name), whole), name
        if whole.dim() == 2:
            assert torch.equal(
                source.read(name, 0, [(5, 19), (30, 31)]), torch.cat([whole[5:19], whole[30:31]])
            )
            assert torch.equal(
                source.read(name, 1, [(3, 17), (20, 32)]), torch.cat([whole[:, 3:17], whole[:, 20:32]], 1)
            )
    assert source.is_quantized(QKV) and not source.is_quantized("embedding.word_embeddings.weight")
    assert source.is_quantized("decoder.layers.0.self_attention.linear_proj.weight") == (way != "nf4-skipped")
    matrices = source.quantized(QKV)
    assert matrices is not None and [one.shape for one in matrices] == [(32, 32), (16, 32), (16, 32)]


def damaged(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def _state(**values: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = f"{Q_PROJ}.quant_state.bitsandbytes__nf4"
        content = {**json.loads(bytes(tensors[name].tolist())), **values}
        tensors[name] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)

    return change


def _put(part: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({f"{Q_PROJ}{part}": tensor})


def _drop(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{Q_PROJ}{part}"]

    return change


HOSTILE = [
    (_drop(".absmax"), r"q_proj.weight.absmax is missing"),
    (_drop(".nested_absmax"), r"q_proj.weight.nested_absmax is missing"),
    (_drop(""), "without model.layers.1.self_attn.q_proj.weight"),
    (_drop(".quant_state.bitsandbytes__nf4"), "expected one of .*bitsandbytes__nf4"),
    (_put("", torch.zeros(513, 1, dtype=torch.uint8)), r"uint8 \[513, 1\]; expected uint8 \[512, 1\]"),
    (_put(".absmax", torch.zeros(17, dtype=torch.uint8)), r"uint8 \[17\]; expected uint8 \[16\]"),
    (_put(".absmax", torch.zeros(16)), r"float32 \[16\]; expected uint8 \[16\]"),
    (_put(".quant_state.bitsandbytes__nf4", torch.tensor(list(b"{]"), dtype=torch.uint8)), "not valid JSON"),
    (
        _put(".quant_state.bitsandbytes__nf4", torch.tensor(list(b"[1]"), dtype=torch.uint8)),
        "expected a JSON object",
    ),
    (
        _put(".quant_state.bitsandbytes__nf4", torch.zeros(70000, dtype=torch.uint8)),
        "expected a text in uint8",
    ),
    (_state(quant_type="fp4"), "quant_type is 'fp4'; expected nf4"),
    (_state(blocksize=0), "blocksize is 0; expected one of 32"),
    (_state(dtype="float64"), "dtype is 'float64'"),
    (_state(shape=[32, -1]), "shape is .*; expected two sizes"),
    (_state(shape=[1 << 40, 1 << 40]), "expected two sizes"),
    (_state(shape=[16, 64]), r"shape \[16, 64\]"),
    (_state(nested_offset=float("nan")), "nested_offset is nan; expected finite"),
    (_state(nested_blocksize=128), "nested_blocksize is 128; expected 256"),
    (_state(blocksize=128), "expected uint8 .8. by the state"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=[message[:30] for _, message in HOSTILE])
def test_damaged_folders_are_refused(
    folders: Callable[[str], Path],
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], None],
    message: str,
) -> None:
    with pytest.raises(Refused, match=message):
        HfSource(damaged(folders("nf4-double"), tmp_path / "bad", change))


@pytest.mark.parametrize("part", [".quant_map", ".nested_quant_map", ".nested_absmax"])
def test_other_tables_and_infinite_statistics_are_refused(
    folders: Callable[[str], Path], tmp_path: Path, part: str
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q_PROJ}{part}"][0] = float("inf") if part == ".nested_absmax" else 0.5

    source = HfSource(damaged(folders("nf4-double"), tmp_path / "bad", change))
    with pytest.raises(
        Refused, match="not finite" if part == ".nested_absmax" else "is not the table of nf4"
    ):
        source.quantized(QKV)


def test_mixed_shards_are_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """A plain matrix of a kind that is quantised in other layers, within a fused weight and alone."""
    for matrix, message in (
        ("self_attn.q_proj", "fused matrices must agree"),
        ("self_attn.o_proj", "different checkpoints"),
    ):

        def change(tensors: dict[str, torch.Tensor], matrix: str = matrix) -> None:
            name = f"model.layers.1.{matrix}.weight"
            for one in [one for one in tensors if one.startswith(name)]:
                del tensors[one]
            tensors[name] = torch.zeros(32, 32, dtype=torch.bfloat16)

        with pytest.raises(Refused, match=message):
            HfSource(damaged(folders("nf4-double"), tmp_path / matrix, change))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_other_ways_of_quantising_are_refused_by_name(
    folders: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    folder = shutil.copytree(folders("nf4"), tmp_path / method)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match=rf"quant_method '{method}'\) is not supported, only 'bitsandbytes'"):
        HfSource(folder)
