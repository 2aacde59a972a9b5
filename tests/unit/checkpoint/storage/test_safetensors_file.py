from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mindspeed_lora.checkpoint.storage import safetensors_file
from mindspeed_lora.checkpoint.storage.safetensors_file import SafetensorsFile
from mindspeed_lora.errors import Failed, Refused


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, int] = (0, 8)) -> Any:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool],
)
def test_reads_what_the_library_wrote(tmp_path: Path, dtype: torch.dtype):
    tensors = {
        "matrix": torch.randint(0, 2, (5, 7)).to(dtype),
        "vector": torch.randint(0, 2, (3,)).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "nothing": torch.empty((0, 4), dtype=dtype),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        assert torch.equal(file.read(name), tensor)
        assert file.read(name).dtype == dtype


@settings(max_examples=80, deadline=None)
@given(
    rows=st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted),
    columns=st.tuples(st.integers(0, 11), st.integers(0, 11)).map(sorted),
    chunk=st.sampled_from([1, 50, 1 << 20]),
    row_read=st.sampled_from([1, 1 << 20]),
)
def test_any_region(tmp_path_factory, rows, columns, chunk, row_read):
    whole = torch.arange(99, dtype=torch.float32).view(9, 11)
    path = tmp_path_factory.mktemp("region") / "a.safetensors"
    save_file({"before": torch.ones(3), "w": whole}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_file, "CHUNK_BYTES", chunk)
        patch.setattr(safetensors_file, "MIN_ROW_READ", row_read)
        out = torch.empty((rows[1] - rows[0], columns[1] - columns[0]))
        SafetensorsFile(path).read_into(out, "w", (tuple(rows), tuple(columns)))
    assert torch.equal(out, whole[rows[0] : rows[1], columns[0] : columns[1]])


def test_buffers_are_our_own(tmp_path: Path):
    save_file({"w": torch.ones(4)}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    tensor = file.read("w")
    tensor.zero_()
    assert torch.equal(file.read("w"), torch.ones(4))


def test_an_open_file_says_nothing_when_python_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_file({"w": torch.ones(4)}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    file.read("w")
    with monkeypatch.context() as ending:
        ending.setattr(safetensors_file, "os", None)
        file.__del__()
    file.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\1\0\0", "not a safetensors file"),
        (bytes(8), "no header"),
        ((100).to_bytes(8, "little") + b"{}", "claims 100 bytes, the file has 10"),
        (b"\xff" * 20, "not a safetensors file or truncated"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "fetch them with git lfs pull",
        ),
        (b"\x80\x02}q\x00." + bytes(20), "not a safetensors file or truncated"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(Refused, match=message) as error:
        SafetensorsFile(tmp_path / "bad.safetensors")
    assert str(tmp_path / "bad.safetensors") in str(error.value)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "not valid JSON"),
        (b"[]", b"", "not a JSON object"),
        (b'{"a": 1, "a": 2}', b"", "'a' occurs twice"),
        ({"a": entry()}, bytes(7), "has 7. bytes where its header promises .*truncated"),
        ({"a": entry()}, bytes(9), "where its header promises .*damaged"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "tensor b overlaps the one before it"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), "tensor b leaves a hole before it"),
        ({"a": entry(dtype="F4_WEIRD")}, bytes(8), "tensor a has dtype F4_WEIRD"),
        ({"a": entry(shape=(3,))}, bytes(8), r"shape \[3\] in F32 needs 12 bytes, its header entry has 8"),
        ({"a": entry(shape=(-2,))}, bytes(8), "entry of tensor a is damaged"),
        ({"a": entry(offsets=(8, 0))}, bytes(8), "entry of tensor a is damaged"),
        ({"a": {"dtype": "F32"}}, bytes(8), "entry of tensor a is damaged"),
        ({"a": 3}, bytes(8), "entry of tensor a is damaged"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: Any, data: bytes, message: str):
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(Refused, match=message) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(Refused, match="the file is missing"):
        SafetensorsFile(tmp_path / "absent.safetensors")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    file = SafetensorsFile(path)
    with path.open("r+b") as handle:
        handle.truncate(500)
    with pytest.raises(Failed, match="it is truncated"):
        file.read("w")
