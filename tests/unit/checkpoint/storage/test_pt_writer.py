from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import pytest
import torch

from mindspeed_lora.checkpoint.storage.pt_file import PtFile
from mindspeed_lora.checkpoint.storage.pt_writer import PtWriter

TENSORS = {
    "matrix": torch.randn(5, 7).bfloat16(),
    "vector": torch.randn(3),
    "columns": torch.randn(6, 6)[:, 1:4].half(),
    "none": torch.empty(0, 2),
}


def write(path: Path) -> None:
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    content = {"args": argparse.Namespace(params_dtype=torch.bfloat16), "iteration": 1}
    with PtWriter(path, content, {"model": specs}) as writer:
        for name, tensor in TENSORS.items():
            writer.write(f"model/{name}", tensor)


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_was_written(tmp_path: Path, mmap: bool):
    path = tmp_path / "model_optim_rng.pt"
    write(path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert loaded["args"].params_dtype == torch.bfloat16 and loaded["iteration"] == 1
    assert list(loaded["model"]) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert loaded["model"][name].dtype == tensor.dtype
        assert torch.equal(loaded["model"][name], tensor)
        assert loaded["model"][name].is_contiguous()


def test_the_archive_is_sound_and_aligned(tmp_path: Path):
    path = tmp_path / "model_optim_rng.pt"
    write(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    file = PtFile(path)
    assert all(file.entry(name, tensor).offset % 64 == 0 for name, tensor in file.content["model"].items())


def test_a_tensor_that_was_not_announced_so(tmp_path: Path):
    with (
        pytest.raises(ValueError, match="model/matrix: got .* announced"),
        PtWriter(tmp_path / "a.pt", {}, {"model": {"matrix": (torch.float32, (2, 2))}}) as writer,
    ):
        writer.write("model/matrix", torch.ones(3))


def test_a_tensor_that_was_never_written(tmp_path: Path):
    with (
        pytest.raises(ValueError, match="never written: model/w"),
        PtWriter(tmp_path / "a.pt", {}, {"model": {"w": (torch.float32, (2,))}}),
    ):
        pass


def test_several_models_may_have_the_same_names(tmp_path: Path):
    path, spec = tmp_path / "a.pt", {"w": (torch.float32, (2,))}
    with PtWriter(path, {}, {"model0": spec, "model1": spec}) as writer:
        writer.write("model1/w", torch.ones(2))
        writer.write("model0/w", torch.zeros(2))
    content = torch.load(path, weights_only=True)
    assert content["model0"]["w"].tolist() == [0, 0] and content["model1"]["w"].tolist() == [1, 1]
