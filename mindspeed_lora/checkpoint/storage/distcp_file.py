"""Reading the ``.distcp`` files of a ``torch.distributed.checkpoint`` by ranges.

Each chunk is a ``torch.save`` archive of one tensor within the file. Its end is read (the archive's directory), then
its pickle as plain data, then those bytes of the tensor that are wanted.
"""

from __future__ import annotations

import io
import os
import zipfile
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mindspeed_lora.checkpoint.storage.dcp_metadata import METADATA_FILE, Chunk, are_sizes
from mindspeed_lora.checkpoint.storage.manifest import TensorCheck, record_of
from mindspeed_lora.checkpoint.storage.plain_pickle import PickleRefused, Plain, load_plain, plain
from mindspeed_lora.checkpoint.storage.safetensors_file import TensorEntry, read_region
from mindspeed_lora.errors import Failed, Refused
from mindspeed_lora.models.families.mapping import Region

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_ALLOWED: dict[tuple[str, str], Any] = {
    **plain("torch._utils", "_rebuild_tensor_v2"),
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    ("collections", "OrderedDict"): dict,
}
_MAX_PICKLE_BYTES = 1 << 20
_LOCAL_HEADER = 30


class DistcpFiles:
    """The files of one checkpoint folder. Chunks may be read by several threads."""

    def __init__(self, folder: Path, checking: bool = True) -> None:
        self.folder = folder
        self._checking = checking
        self._checks: dict[str, dict[int, TensorCheck]] = {}
        """By file and first byte of the tensor, where a manifest tells them."""
        self._entries: dict[tuple[str, int], TensorEntry] = {}

    def check(self, chunks: Iterable[tuple[str, Chunk]]) -> None:
        """Compare where chunks, each with the key of its tensor, should lie with the files' sizes."""
        sizes: dict[str, int] = {}
        for key, chunk in chunks:
            path = self.folder / chunk.file
            if chunk.file not in sizes:
                if not path.is_file():
                    raise Refused(f"{path}: the file is missing; {METADATA_FILE} places {key} in it.")
                sizes[chunk.file] = path.stat().st_size
                record = record_of(path) if self._checking else None
                tensors = record.tensors if record else {}
                self._checks[chunk.file] = {
                    one.offset: TensorCheck(path, name, one) for name, one in tensors.items()
                }
            if chunk.start + chunk.length > sizes[chunk.file]:
                raise Refused(
                    f"{path}: has {sizes[chunk.file]} bytes, but {METADATA_FILE} places {key} at bytes "
                    f"{chunk.start} to {chunk.start + chunk.length}; it is truncated or of another checkpoint."
                )

    def read_into(
        self, out: torch.Tensor, key: str, dtype: torch.dtype, chunk: Chunk, index: int, region: Region
    ) -> None:
        """Fill ``out`` with ``region`` of a chunk ``[n]`` or ``[rows, columns]``; of a stacked one, of layer ``index``.

        Raises:
            Failed: what lies there is not the promised chunk.
        """
        path = self.folder / chunk.file
        with _opened(path) as file:
            whole = self._entry(file, key, dtype, chunk)
            shape = whole.shape[-len(region) :]
            first = whole.offset + index * prod(shape) * dtype.itemsize
            check = self._checks.get(chunk.file, {}).get(first)
            read_region(file, TensorEntry(dtype, shape, first), out, region, path, check)

    def _entry(self, file: int, key: str, dtype: torch.dtype, chunk: Chunk) -> TensorEntry:
        place = chunk.file, chunk.start
        if place not in self._entries:
            path = self.folder / chunk.file
            try:
                entry = _archived_tensor(file, chunk)
            except Exception as error:  # a damaged archive raises whatever its bytes lead to
                raise Failed(
                    f"{path}: the chunk of {key} at byte {chunk.start} is refused, since {error}; expected a "
                    "torch.save archive of a tensor."
                ) from error
            if (entry.dtype, entry.shape) != (dtype, chunk.sizes):
                raise Failed(
                    f"{path}: the chunk of {key} at byte {chunk.start} has dtype {entry.dtype} and shape "
                    f"{list(entry.shape)}; {METADATA_FILE} means {dtype} and {list(chunk.sizes)}."
                )
            self._entries[place] = entry
        return self._entries[place]


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The file, open for one read: a large checkpoint has more files than a process may hold open."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise Failed(f"{path}: the file is missing.") from error
    try:
        yield file
    finally:
        os.close(file)


class _Window(io.RawIOBase):
    """The bytes of one chunk of an open file, as a stream for ``zipfile``."""

    def __init__(self, file: int, chunk: Chunk) -> None:
        self._file, self._start, self._length = file, chunk.start, chunk.length
        self._position = 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("a position before its start")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._position)
        data = os.pread(self._file, left if size < 0 else min(size, left), self._start + self._position)
        self._position += len(data)
        return data


def _archived_tensor(file: int, chunk: Chunk) -> TensorEntry:
    """Dtype, shape and place in the file of the tensor in a chunk's archive."""
    window = _Window(file, chunk)
    with zipfile.ZipFile(window) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        for info in records.values():
            if info.compress_type != zipfile.ZIP_STORED:
                raise PickleRefused(f"its record {info.filename} is compressed")
        if "data.pkl" not in records or records["data.pkl"].file_size > _MAX_PICKLE_BYTES:
            raise PickleRefused("it holds no tensor")
        tensor = load_plain(archive.read(records["data.pkl"]), _ALLOWED)
        dtype, record, first, shape = _described(tensor)
        if record not in records:
            raise PickleRefused(f"its record {record} is missing")
        info = records[record]
    window.seek(info.header_offset)
    header = window.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER:
        raise EOFError("its end is missing")
    skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = info.header_offset + _LOCAL_HEADER + skip
    stored, needed = info.file_size, (first + prod(shape)) * dtype.itemsize
    if needed > stored or start + stored > chunk.length:
        raise PickleRefused(f"its tensor needs {needed} bytes and {stored} are stored")
    return TensorEntry(dtype, shape, chunk.start + start + first * dtype.itemsize)


def _described(tensor: Any) -> tuple[torch.dtype, str, int, tuple[int, ...]]:
    """Dtype, record, first element and shape of a pickled tensor."""
    if not isinstance(tensor, Plain) or tensor.kind != "_rebuild_tensor_v2" or len(tensor.args) < 4:
        raise PickleRefused("it holds no tensor")
    storage, first, shape, strides = tensor.args[:4]
    if not isinstance(storage, Plain) or storage.kind != "persistent" or len(storage.args) != 5:
        raise PickleRefused("its tensor has no storage")
    _, dtype, record, _, _ = storage.args
    if not are_sizes(shape) or not are_sizes(strides) or not are_sizes((first,)):
        raise PickleRefused("its tensor is damaged")
    if not isinstance(dtype, torch.dtype) or len(shape) != len(strides):
        raise PickleRefused("its tensor is damaged")
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            raise PickleRefused(f"its tensor has strides {strides}, which are not row-major")
        step *= size
    return dtype, f"data/{record}", first, shape
