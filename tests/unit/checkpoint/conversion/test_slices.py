"""A Hugging Face target is written in slices of rows: its files are those that whole tensors make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_lora.checkpoint.formats import hf_writer
from mindspeed_lora.checkpoint.formats.hf import HfSource
from mindspeed_lora.errors import Failed

Convert = Callable[..., None]

ADAPTERS = {
    "merged": {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]},
    "trained in part": {
        "target_modules": ["q_proj"],
        "bias": "lora_only",
        "modules_to_save": ["gate_proj", "up_proj", "lm_head"],
    },
}


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_slices_make_the_files_of_whole_tensors(
    models,
    tmp_path: Path,
    run_convert: Convert,
    peft_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    adapter: str | None,
):
    flags = {"load_dir": models("llama-biased").path, "save_model_type": "hf", "params_dtype": "bf16"}
    if adapter is not None:
        flags["lora_load"] = peft_adapter("llama-biased", **ADAPTERS[adapter])
    run_convert(save_dir=tmp_path / "whole", **flags)
    monkeypatch.setattr(hf_writer, "SLICE_BYTES", 1)
    monkeypatch.setattr(hf_writer, "SLICE_ROWS", 9)
    run_convert(save_dir=tmp_path / "slices", **flags)
    whole, slices = (tmp_path / name / "mg2hf" for name in ("whole", "slices"))
    for name in ("model.safetensors", "checksums.json"):
        assert (whole / name).read_bytes() == (slices / name).read_bytes()
    if adapter == "trained in part":
        name = "model.layers.1.mlp.up_proj.weight"
        stored = load_file(flags["lora_load"] / "adapter_model.safetensors")[f"base_model.model.{name}"]
        assert torch.equal(load_file(slices / "model.safetensors")[name], stored.bfloat16())


def test_a_sliced_tensor_is_still_checked(models, tmp_path: Path, run_convert: Convert, monkeypatch):
    """What is read in slices is compared with the source's checksums."""
    monkeypatch.setattr(hf_writer, "SLICE_BYTES", 1)
    monkeypatch.setattr(hf_writer, "SLICE_ROWS", 9)
    run_convert(load_dir=models("llama").path, save_dir=tmp_path / "one", save_model_type="hf")
    path = tmp_path / "one" / "mg2hf"
    run_convert(load_dir=path, save_dir=tmp_path / "two", save_model_type="hf")
    entry = HfSource(path).files.entry("model.layers.1.mlp.up_proj.weight")
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(entry.offset + entry.num_bytes // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(Failed, match="does not fit its checksum"):
        run_convert(load_dir=path, save_dir=tmp_path / "three", save_model_type="hf")
