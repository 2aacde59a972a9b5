from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mindspeed_lora.checkpoint.storage.safetensors_file import SafetensorsFile
from mindspeed_lora.checkpoint.storage.safetensors_writer import SafetensorsWriter


def test_the_library_reads_what_was_written_in_any_order(tmp_path: Path):
    tensors = {
        "odd": torch.randn(3).bfloat16(),
        "wide": torch.randn(4, 5),
        "cut": torch.randn(6, 6)[:, 2:5],
        "none": torch.empty(0, 2),
    }
    path = tmp_path / "a.safetensors"
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, specs) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert writer.num_bytes == path.stat().st_size
    file = SafetensorsFile(path)
    assert all(entry.offset % entry.dtype.itemsize == 0 for entry in file.entries.values())


def test_a_tensor_that_was_not_announced_so(tmp_path: Path):
    with (
        pytest.raises(ValueError, match=r"w: got torch.float32 \[3\], announced torch.float32 \[2\]"),
        SafetensorsWriter(tmp_path / "a", {"w": (torch.float32, (2,))}) as writer,
    ):
        writer.write("w", torch.ones(3))


def test_a_tensor_that_was_never_written(tmp_path: Path):
    with (
        pytest.raises(ValueError, match="never written: w"),
        SafetensorsWriter(tmp_path / "a", {"w": (torch.float32, (2,))}),
    ):
        pass
