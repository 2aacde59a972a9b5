"""Reading torch.save files: what is in them, and what hostile ones may not do."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mindspeed_lora.checkpoint.storage.pt_file import PtFile
from mindspeed_lora.checkpoint.storage.pt_pickle import Inert
from mindspeed_lora.errors import Refused


def read(file: PtFile, name: str, tensor: torch.Tensor) -> torch.Tensor:
    entry = file.entry(name, tensor)
    out = torch.empty(entry.shape, dtype=entry.dtype)
    file.read_into(out, entry, tuple((0, size) for size in entry.shape))
    return out


def refusal(path: Path) -> str:
    with pytest.raises(Refused) as error:
        PtFile(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_tensors_are_read_from_where_they_lie(tmp_path: Path):
    large = torch.arange(60.0).view(6, 10)
    model = {"a": torch.randn(3, 4).bfloat16(), "view": large[2:4], "same": large}
    path = tmp_path / "model_optim_rng.pt"
    torch.save({"model": model, "args": argparse.Namespace(num_layers=2)}, path)
    file = PtFile(path)
    assert file.content["args"].num_layers == 2
    for name, tensor in model.items():
        assert file.content["model"][name].is_meta
        assert torch.equal(read(file, name, file.content["model"][name]), tensor)


def test_what_real_megatron_files_hold_beside_tensors(tmp_path: Path):
    path = tmp_path / "model_optim_rng.pt"
    content = {
        "args": argparse.Namespace(exit_signal=signal.SIGTERM, save=Path("/somewhere")),
        "rng_state": [{"np_rng_state": np.random.get_state()}],
        "model": {"layer._extra_state": io.BytesIO(b"state"), "w": torch.ones(2)},
    }
    torch.save(content, path)
    file = PtFile(path)
    assert torch.equal(read(file, "w", file.content["model"]["w"]), torch.ones(2))


def test_enums_of_megatron_become_inert(tmp_path: Path):
    path = tmp_path / "model_optim_rng.pt"
    torch.save({"model": {}, "args": argparse.Namespace(attention_backend=1)}, path)
    name = "megatron.core.somewhere.enums\nNewBackend"
    pickled = b"\x80\x02}(X\x04\x00\x00\x00argsc" + name.encode() + b"\nK\x05\x85Ru."
    rewrite(path, pickled)
    assert isinstance(PtFile(path).content["args"], Inert)


def rewrite(path: Path, pickled: bytes) -> None:
    """Replace the pickle inside a torch.save file."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else data)


class Command:
    """An object whose unpickling runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path):
    marker, path = tmp_path / "marker", tmp_path / "model_optim_rng.pt"
    torch.save({"model": {"w": torch.ones(1)}, "args": Command(f"touch {marker}")}, path)
    assert "its pickle uses posix.system, which could run code" in refusal(path)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_is_refused_and_does_not_run(tmp_path: Path, protocol: int):
    marker, path = tmp_path / "marker", tmp_path / "model_optim_rng.pt"
    path.write_bytes(pickle.dumps(Command(f"touch {marker}"), protocol))
    assert "is no torch.save archive" in refusal(path)
    assert not marker.exists()


class Evaluated(Command):
    """An object whose unpickling evaluates an expression."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, (self.command,)


def test_code_behind_an_inert_name_is_refused(tmp_path: Path):
    path, marker = tmp_path / "model_optim_rng.pt", tmp_path / "marker"
    torch.save({"model": {}}, path)
    attack = {"rng": np.zeros(2), "extra": io.BytesIO(b""), "args": Evaluated(f"open({str(marker)!r}, 'w')")}
    rewrite(path, pickle.dumps(attack, 2))
    assert "its pickle uses builtins.eval" in refusal(path).replace("__builtin__", "builtins")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("keep", "message"), [(0, "is empty"), (100, "no torch.save archive"), (-30, "or truncated")]
)
def test_damaged_archives(tmp_path: Path, keep: int, message: str):
    path = tmp_path / "model_optim_rng.pt"
    torch.save({"model": {"w": torch.ones(100)}}, path)
    path.write_bytes(path.read_bytes()[:keep])
    assert message in refusal(path)


def test_compressed_archives_are_refused(tmp_path: Path):
    path = tmp_path / "model_optim_rng.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
    assert "is compressed" in refusal(path)


def test_a_storage_that_claims_more_than_its_record(tmp_path: Path):
    path = tmp_path / "model_optim_rng.pt"
    torch.save({"w": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("model_optim_rng/data.pkl")
    assert pickled.count(b"K\x04") == 2
    rewrite(path, pickled.replace(b"K\x04", b"K\x09"))
    file = PtFile(path)
    with pytest.raises(Refused, match="the storage of w does not fit its record"):
        file.entry("w", file.content["w"])


def test_transposed_tensors_are_refused(tmp_path: Path):
    path = tmp_path / "model_optim_rng.pt"
    torch.save({"w": torch.zeros(4, 3).t()}, path)
    file = PtFile(path)
    with pytest.raises(Refused, match="expected row-major"):
        file.entry("w", file.content["w"])
