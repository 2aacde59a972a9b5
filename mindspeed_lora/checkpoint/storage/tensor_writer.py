"""Writing a file of tensors whose every byte has its place before the first tensor is there.

A :class:`FileLayout` is a format: where each tensor's bytes lie and what lies around them. A :class:`TensorWriter`
fills it with ``pwrite``: tensors come in any order and from several threads, and checksums of each tensor and of the
whole file come out of it.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType

import torch

from mindspeed_lora.checkpoint.storage.crc32 import combine

TensorSpec = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape."""


def spec_bytes(spec: TensorSpec) -> int:
    """Bytes that a tensor takes in a file."""
    dtype, shape = spec
    return prod(shape) * dtype.itemsize


@dataclass(frozen=True)
class TensorRecord:
    """Where a tensor's bytes lie in its file, and their CRC-32."""

    offset: int
    num_bytes: int
    crc32: int


@dataclass(frozen=True)
class FileRecord:
    """What is known of a written file."""

    num_bytes: int
    crc32: int
    tensors: Mapping[str, TensorRecord] = field(default_factory=dict)
    """Its tensors by the names under which they were written."""


class FileLayout:
    """Where the bytes of a file lie: its head, then tensor after tensor with what surrounds it, then its tail."""

    specs: dict[str, TensorSpec]
    """The tensors in the order in which they lie in the file."""
    offsets: dict[str, int]
    """Position of each tensor's first byte."""
    num_bytes: int
    """Size of the whole file."""

    def head(self) -> bytes:
        """The bytes before all else."""
        raise NotImplementedError

    def around(self, name: str, crc: int) -> tuple[bytes, bytes]:
        """The bytes right before and right after a tensor, whose own bytes have this checksum; none by default."""
        return b"", b""

    def tail(self, crcs: Mapping[str, int]) -> bytes:
        """The bytes after the last tensor, given all tensors' checksums; none by default."""
        return b""


class TensorWriter:
    """A file being written; each announced tensor is written exactly once, whole or in blocks."""

    def __init__(self, path: Path, layout: FileLayout) -> None:
        self.path = path
        self.layout = layout
        self.specs = layout.specs
        self.num_bytes = layout.num_bytes
        self._crcs: dict[str, int] = {}
        self._pending = {name: spec_bytes(spec) for name, spec in layout.specs.items()}
        self._blocks: dict[str, dict[int, tuple[int, int]]] = {}
        """Of tensors that are written in part: checksum and size of each block by its first byte."""
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._write_at(memoryview(layout.head()), 0)

    def write(self, name: str, tensor: torch.Tensor, at: int | None = None) -> None:
        """Write one tensor, or consecutive values of it from number ``at`` on. Several threads may call it.

        Raises:
            ValueError: dtype or shape are not those announced, or the values do not lie within it.
        """
        start = self._check(name, tensor, at)
        flat = tensor.contiguous().view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
        data = memoryview(flat)  # type: ignore[arg-type]
        crc, offset = zlib.crc32(data), self.layout.offsets[name] + start
        self._write_at(data, offset)
        _start_writeback(self._file, offset, len(data))
        with self._lock:
            blocks = self._blocks.setdefault(name, {})
            if start in blocks or len(data) > self._pending[name]:
                raise ValueError(f"{name}: value {at or 0} is written twice")
            blocks[start] = crc, len(data)
            self._pending[name] -= len(data)
            complete = not self._pending[name]
        if complete:
            self._complete(name)

    def _check(self, name: str, tensor: torch.Tensor, at: int | None) -> int:
        """The place of the first byte within the announced tensor."""
        dtype, shape = self.specs[name]
        first = at or 0
        fits = tuple(tensor.shape) == shape if at is None else first + tensor.numel() <= prod(shape)
        if tensor.dtype != dtype or not fits:
            place = "" if at is None else f" at value {at}"
            raise ValueError(
                f"{name}: got {tensor.dtype} {list(tensor.shape)}{place}, announced {dtype} {list(shape)}"
            )
        return first * dtype.itemsize

    def _complete(self, name: str) -> None:
        """All of a tensor is in the file: what surrounds it, and its checksum."""
        crc = end = 0
        for start, (own, size) in sorted(self._blocks.pop(name).items()):
            if start != end:
                raise ValueError(f"{name}: blocks overlap at byte {min(start, end)}")
            crc, end = combine(crc, own, size), start + size
        offset = self.layout.offsets[name]
        before, after = self.layout.around(name, crc)
        self._write_at(memoryview(before), offset - len(before))
        self._write_at(memoryview(after), offset + spec_bytes(self.specs[name]))
        self._crcs[name] = crc

    def close(self) -> FileRecord:
        """End the file and flush it to disk; every announced tensor must have been written."""
        missing = sorted(name for name in self.specs if name not in self._crcs)
        if missing:
            raise ValueError(f"{self.path}: never written: {', '.join(missing[:3])}")
        tail = self.layout.tail(self._crcs)
        self._write_at(memoryview(tail), self.num_bytes - len(tail))
        with _named(self.path):
            os.fsync(self._file)
        os.close(self._file)
        offsets = self.layout.offsets
        tensors = {
            name: TensorRecord(offsets[name], spec_bytes(spec), self._crcs[name])
            for name, spec in self.specs.items()
        }
        return FileRecord(self.num_bytes, self._whole_crc(tail), tensors)

    def _write_at(self, data: memoryview, offset: int) -> None:
        """Write all of ``data`` at a position of the file."""
        with _named(self.path):
            done = 0
            while done < len(data):
                done += os.pwrite(self._file, data[done:], offset + done)

    def _whole_crc(self, tail: bytes) -> int:
        crc = zlib.crc32(self.layout.head())
        for name, spec in self.specs.items():
            before, after = self.layout.around(name, self._crcs[name])
            crc = combine(zlib.crc32(before, crc), self._crcs[name], spec_bytes(spec))
            crc = zlib.crc32(after, crc)
        return zlib.crc32(tail, crc)

    def abandon(self) -> None:
        """Close the file as it is, after a failure."""
        os.close(self._file)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """The system's errors about an open file do not tell which one it is."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _start_writeback(file: int, offset: int, size: int) -> None:
    """Let the disk begin with these bytes while others are made; the flush at the end then has less to wait for."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is not None:
        # On Linux this starts writing dirty pages, and drops only those that are on disk already.
        advise(file, offset, size, os.POSIX_FADV_DONTNEED)
