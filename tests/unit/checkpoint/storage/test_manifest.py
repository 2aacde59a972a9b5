from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch

from mindspeed_lora.checkpoint.storage.crc32 import combine
from mindspeed_lora.checkpoint.storage.manifest import (
    MANIFEST_FILE,
    check_files,
    manifest_folder,
    read_manifest,
    write_manifest,
)
from mindspeed_lora.checkpoint.storage.pt_file import PtFile
from mindspeed_lora.checkpoint.storage.pt_writer import PtLayout
from mindspeed_lora.checkpoint.storage.safetensors_file import SafetensorsFile
from mindspeed_lora.checkpoint.storage.safetensors_writer import SafetensorsLayout
from mindspeed_lora.checkpoint.storage.tensor_writer import FileLayout, TensorWriter
from mindspeed_lora.errors import Failed, Refused

TENSORS = {
    "matrix": torch.randn(5, 7).bfloat16(),
    "vector": torch.randn(3),
    "empty": torch.empty(0, 2),
    "long": torch.randn(300, 4),
}
SPECS = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize(
    ("one", "two"), [(b"", b"abc"), (b"abc", b""), (b"a" * 1000, b"\0" * 77), (b"xy", b"z")]
)
def test_checksums_of_parts_combine(one: bytes, two: bytes):
    assert combine(zlib.crc32(one), zlib.crc32(two), len(two)) == zlib.crc32(one + two)


@pytest.fixture(params=["a.safetensors", "sub/model_optim_rng.pt"])
def folder(request, tmp_path: Path) -> Path:
    """A folder with one file of weights, written last tensor first, and its manifest."""
    path = tmp_path / request.param
    path.parent.mkdir(exist_ok=True)
    layout: FileLayout
    if path.suffix == ".pt":
        layout, key = PtLayout(path.stem, {"iteration": 1}, {"model": SPECS}), "model/"
    else:
        layout, key = SafetensorsLayout(SPECS), ""
    writer = TensorWriter(path, layout)
    for name in reversed(TENSORS):
        writer.write(key + name, TENSORS[name])
    write_manifest(tmp_path, {request.param: writer.close()})
    return tmp_path


def test_blocks_of_rows_make_the_same_file(folder: Path, tmp_path: Path):
    path = weights(folder)
    again = tmp_path / "again" / path.name
    again.parent.mkdir()
    layout: FileLayout
    if path.suffix == ".pt":
        layout, key = PtLayout(path.stem, {"iteration": 1}, {"model": SPECS}), "model/"
    else:
        layout, key = SafetensorsLayout(SPECS), ""
    with TensorWriter(again, layout) as writer:
        for name, tensor in TENSORS.items():
            for row in reversed(range(0, max(1, len(tensor)), 2)):
                writer.write(key + name, tensor[row : row + 2], row * tensor[:1].numel())
    assert again.read_bytes() == path.read_bytes()


def test_rows_come_once_and_within_the_tensor(tmp_path: Path):
    writer = TensorWriter(tmp_path / "a", SafetensorsLayout(SPECS))
    writer.write("vector", TENSORS["vector"][:2], 0)
    with pytest.raises(ValueError, match="vector: value 0 is written twice"):
        writer.write("vector", TENSORS["vector"][:1], 0)
    with pytest.raises(ValueError, match="vector: blocks overlap"):
        writer.write("vector", TENSORS["vector"][1:2], 1)
    with pytest.raises(ValueError, match="long: got torch.float32 .2, 4. at value 1196"):
        writer.write("long", TENSORS["long"][:2], 1196)
    with pytest.raises(ValueError, match="never written: empty, long, matrix"):
        writer.close()
    writer.abandon()


def weights(folder: Path) -> Path:
    (path,) = read_manifest(folder)
    return folder / path


def read_all(path: Path) -> None:
    """Every tensor whole, its rows in two pieces."""
    if path.suffix == ".pt":
        pt = PtFile(path)
        for name, meta in pt.content["model"].items():
            entry = pt.entry(name, meta)
            rows = entry.shape[0]
            for low, high in ((0, rows // 2), (rows // 2, rows)):
                out = torch.empty(high - low, *entry.shape[1:], dtype=entry.dtype)
                pt.read_into(out, entry, ((low, high), *((0, size) for size in entry.shape[1:])))
        return
    file = SafetensorsFile(path)
    for name in TENSORS:
        assert torch.equal(file.read(name), TENSORS[name])


def test_the_manifest_tells_the_checksum_of_the_file_as_it_is(folder: Path):
    path = weights(folder)
    (record,) = read_manifest(folder).values()
    data = path.read_bytes()
    assert (len(data), zlib.crc32(data)) == (record.num_bytes, record.crc32)
    for name, tensor in record.tensors.items():
        own = data[tensor.offset : tensor.offset + tensor.num_bytes]
        assert zlib.crc32(own) == tensor.crc32, name
    assert check_files(folder) == len(data)
    assert check_files(folder, (1, 2)) == 0
    read_all(path)


@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_is_found_where_it_is(folder: Path, bit: int):
    path = weights(folder)
    (record,) = read_manifest(folder).values()
    name = next(name for name in record.tensors if name.endswith("long"))
    data = bytearray(path.read_bytes())
    data[record.tensors[name].offset + 4000] ^= 1 << bit
    path.write_bytes(data)
    for check in (lambda: check_files(folder), lambda: read_all(path)):
        with pytest.raises(Failed, match=f"{path.name}: tensor {name} does not fit its checksum"):
            check()


def test_a_flipped_bit_of_the_header(folder: Path):
    path = weights(folder)
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)
    with pytest.raises(Failed, match="the header does not fit"):
        check_files(folder)


def test_files_that_are_not_what_was_written(folder: Path):
    path = weights(folder)
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    with pytest.raises(Failed, match=f"has {len(data) - 5} bytes, checksums.json says {len(data)}"):
        check_files(folder)
    with pytest.raises(Refused, match=f"has {len(data) - 5} bytes, .*checksums.json says {len(data)}"):
        read_all(path)
    path.unlink()
    with pytest.raises(Failed, match="the file is missing"):
        check_files(folder)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"version": 1}', '{"version": 1, "files": {"a": {"bytes": "x"}}}', '{"version": 2}']
)
def test_a_damaged_manifest(tmp_path: Path, text: str):
    (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(Refused, match=MANIFEST_FILE):
        read_manifest(tmp_path)


def test_no_manifest(tmp_path: Path):
    assert read_manifest(tmp_path) == {} and check_files(tmp_path) == 0
    assert manifest_folder(tmp_path) is None
    write_manifest(tmp_path, {})
    assert manifest_folder(tmp_path / "a" / "b") == tmp_path
    assert json.loads((tmp_path / MANIFEST_FILE).read_text()) == {"version": 1, "files": {}}
