"""Reading safetensors by byte ranges: 8 bytes of header length, a JSON header, then the tensors' bytes.

Tensors are read with ``preadv`` into buffers of our own. Nothing is memory-mapped, so that resident memory is
what was really asked for. The header is checked in full before any tensor is read.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.checkpoint.storage.manifest import TensorCheck, record_of
from mindspeed_lora.errors import Failed, Refused
from mindspeed_lora.models.families.mapping import Region

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_LFS_POINTER = b"version "
"""The first 8 bytes of the text that Git LFS leaves in the place of a file."""

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

CHUNK_BYTES = 16 << 20
"""Column slices of short rows are read through whole rows, this many bytes at a time."""

MIN_ROW_READ = 1 << 10
"""A column slice of at least this many bytes a row is read row by row, and nothing else with it: the tensor-parallel
ranks of a node then read each byte of a row-parallel matrix once in all."""


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Position of its first byte, from the start of the file."""

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return prod(self.shape) * self.dtype.itemsize


def read_at(file: int, out: torch.Tensor, offset: int, path: Path, check: TensorCheck | None = None) -> None:
    """Fill the contiguous tensor ``out`` with the bytes of an open file from ``offset`` on."""
    if out.numel() == 0:
        return
    buffer = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    _read_bytes(file, buffer, offset, path)
    if check is not None:
        check.feed(buffer, offset)


def _read_bytes(file: int, buffer: Any, offset: int, path: Path) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done:]], offset + done)
        if count == 0:
            raise Failed(f"{path}: the file ends at byte {offset + done}, within a tensor; it is truncated.")
        done += count


def read_region(
    file: int,
    entry: TensorEntry,
    out: torch.Tensor,
    region: Region,
    path: Path,
    check: TensorCheck | None = None,
) -> None:
    """Fill ``out`` with ``region`` of a row-major tensor ``[n]`` or ``[rows, columns]`` of an open file.

    A ``check`` follows what is read through whole rows.
    """
    item = entry.dtype.itemsize
    row_items = prod(entry.shape[1:])
    start, stop = region[0]
    low, high = region[1] if len(region) > 1 else (0, row_items)
    base = entry.offset + start * row_items * item
    if (low, high) == (0, row_items) and out.is_contiguous():
        read_at(file, out, base, path, check)
    elif (low, high) != (0, row_items) and (high - low) * item >= MIN_ROW_READ and out.stride(-1) == 1:
        rows = out.view(torch.uint8).numpy()
        for index in range(stop - start):
            _read_bytes(file, rows[index], base + (index * row_items + low) * item, path)
    else:
        step = max(1, CHUNK_BYTES // max(1, row_items * item))
        for first in range(0, stop - start, step):
            whole = torch.empty((min(step, stop - start - first), row_items), dtype=entry.dtype)
            read_at(file, whole, base + first * row_items * item, path, check)
            out[first : first + whole.shape[0]].copy_(whole[:, low:high])


class SafetensorsFile:
    """One safetensors file, its header checked against its size."""

    def __init__(self, path: Path, checking: bool = True) -> None:
        self.path = path
        record = record_of(path) if checking else None
        self._checks = (
            {name: TensorCheck(path, name, one) for name, one in record.tensors.items()} if record else {}
        )
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                header, self.data_start = _read_header(file.fileno(), size, path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            link = f"; it is a link to {os.readlink(path)}, and nothing is there" if path.is_symlink() else ""
            raise Refused(f"{path}: the file is missing{link}.") from error
        metadata = header.pop("__metadata__", {})
        self.metadata: dict[str, str] = metadata if isinstance(metadata, dict) else {}
        self.entries = _parse_entries(header, self.data_start, size, path)
        self._file: int | None = None
        self._opening = threading.Lock()

    def read_into(self, out: torch.Tensor, name: str, region: Region) -> None:
        """Fill ``out`` with ``region`` of a tensor."""
        with self._opening:
            if self._file is None:
                self._file = os.open(self.path, os.O_RDONLY)
        read_region(self._file, self.entries[name], out, region, self.path, self._checks.get(name))

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor."""
        entry = self.entries[name]
        out = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(out, name, tuple((0, size) for size in entry.shape) or ((0, 1),))
        return out

    def close(self) -> None:
        """Close the file; reading opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        # Where Python itself ends its modules may be gone; the system closes the file then.
        if os is not None and getattr(self, "_file", None) is not None:
            self.close()


def _read_header(file: int, size: int, path: Path) -> tuple[dict[str, Any], int]:
    if size == 0:
        raise Refused(f"{path}: the file is empty.")
    head = os.pread(file, 8, 0)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length == 0:
        raise Refused(f"{path}: not a safetensors file (no header).")
    if head == _LFS_POINTER:
        raise Refused(
            f"{path}: a pointer of Git LFS in the place of the weights; fetch them with git lfs pull."
        )
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise Refused(
            f"{path}: not a safetensors file or truncated: its header claims {length} bytes, "
            f"the file has {size}."
        )
    try:
        header = json.loads(os.pread(file, length, 8), object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise Refused(f"{path}: the safetensors header is not valid JSON ({error}).") from error
    if not isinstance(header, dict):
        raise Refused(f"{path}: the safetensors header is not a JSON object.")
    return header, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"'{key}' occurs twice")
        result[key] = value
    return result


def _parse_entries(header: dict[str, Any], data_start: int, size: int, path: Path) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, value in header.items():
        entries[name], span = _parse_entry(name, value, data_start, path)
        spans.append((*span, name))
    position = 0
    for start, stop, name in sorted(spans):
        if start != position:
            problem = "overlaps the one before it" if start < position else "leaves a hole before it"
            raise Refused(
                f"{path}: the safetensors header is damaged: tensor {name} {problem} (byte {start})."
            )
        position = stop
    if data_start + position != size:
        raise Refused(
            f"{path}: the file has {size} bytes where its header promises {data_start + position}; "
            f"it is {'truncated' if size < data_start + position else 'damaged'}."
        )
    return entries


def _parse_entry(name: str, value: Any, data_start: int, path: Path) -> tuple[TensorEntry, tuple[int, int]]:
    try:
        dtype_name, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        valid = (
            all(isinstance(number, int) and number >= 0 for number in (*shape, start, stop)) and start <= stop
        )
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise Refused(f"{path}: the safetensors header entry of tensor {name} is damaged.")
    if dtype_name not in DTYPES:
        raise Refused(
            f"{path}: tensor {name} has dtype {dtype_name}, which is not supported; "
            f"supported are {', '.join(DTYPES)}."
        )
    entry = TensorEntry(DTYPES[dtype_name], shape, data_start + start)
    if entry.num_bytes != stop - start:
        raise Refused(
            f"{path}: tensor {name} of shape {list(shape)} in {dtype_name} needs {entry.num_bytes} bytes, "
            f"its header entry has {stop - start}."
        )
    return entry, (start, stop)
