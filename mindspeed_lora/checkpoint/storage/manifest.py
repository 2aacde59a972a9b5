"""``checksums.json``: size and CRC-32 of every file of weights that a conversion wrote, and of each tensor in it.

``{"version": 1, "files": {"model.safetensors": {"bytes": n, "crc32": "0a1b2c3d", "tensors": {name: [offset, bytes,
crc32]}}}}``, paths relative to the folder of the manifest.

A tensor that is read whole is checked as its bytes pass; :func:`check_files` reads files for nothing but their
checksums.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_lora.checkpoint.storage.tensor_writer import FileRecord, TensorRecord
from mindspeed_lora.errors import Failed, Refused

MANIFEST_FILE = "checksums.json"
_VERSION = 1
_BLOCK_BYTES = 16 << 20
_STALE = f"delete {MANIFEST_FILE} if the file was changed on purpose"


def write_manifest(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Write the manifest of a folder whose files are keyed by their relative paths."""
    (folder / MANIFEST_FILE).write_text(manifest_text(files), encoding="utf-8")


def manifest_text(files: Mapping[str, FileRecord]) -> str:
    """The content of a manifest."""
    content = {"version": _VERSION, "files": {path: to_json(files[path]) for path in sorted(files)}}
    return json.dumps(content, indent=1) + "\n"


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The records of a folder's manifest by relative path; empty where there is none."""
    file = folder / MANIFEST_FILE
    try:
        changed = file.stat().st_mtime_ns
    except FileNotFoundError:
        return {}
    return _parsed(file, changed)


@functools.lru_cache(maxsize=8)
def _parsed(file: Path, changed: int) -> dict[str, FileRecord]:
    """The records of a manifest as it was at a time; every file of a folder asks for them."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["version"] != _VERSION:
            raise Refused(f"{file}: version {content['version']!r}; expected {_VERSION}.")
        return {path: from_json(record) for path, record in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(
            f"{file}: damaged ({error!r}); restore it, or delete it to go without checks."
        ) from error


def manifest_folder(path: Path, levels: int = 3) -> Path | None:
    """The nearest folder with a manifest, of ``path`` and the ones above it."""
    for folder in [path, *path.parents][:levels]:
        if (folder / MANIFEST_FILE).is_file():
            return folder
    return None


def to_json(record: FileRecord) -> dict[str, Any]:
    """A record as the manifest has it."""
    tensors = {name: [one.offset, one.num_bytes, f"{one.crc32:08x}"] for name, one in record.tensors.items()}
    return {"bytes": record.num_bytes, "crc32": f"{record.crc32:08x}", "tensors": tensors}


def from_json(value: Mapping[str, Any]) -> FileRecord:
    """A record from the manifest's form."""
    tensors = {
        str(name): TensorRecord(int(offset), int(size), int(crc, 16))
        for name, (offset, size, crc) in value["tensors"].items()
    }
    return FileRecord(int(value["bytes"]), int(value["crc32"], 16), tensors)


def record_of(path: Path) -> FileRecord | None:
    """What the manifest near a file tells of it; None where none does.

    Raises:
        Refused: the file has not the size that the manifest tells.
    """
    folder = manifest_folder(path.parent)
    if folder is None:
        return None
    record = read_manifest(folder).get(path.relative_to(folder).as_posix())
    if record is not None and path.exists() and path.stat().st_size != record.num_bytes:
        raise Refused(
            f"{path}: has {path.stat().st_size} bytes, {folder / MANIFEST_FILE} says {record.num_bytes}; the file is "
            f"damaged or of another run; restore it, or {_STALE}."
        )
    return record


class TensorCheck:
    """The checksum of one tensor, followed while its bytes are read from first to last.

    Bytes that come out of order end the check: a part of a tensor has no checksum.
    """

    def __init__(self, path: Path, name: str, record: TensorRecord) -> None:
        self._what = path, name
        self._record = record
        self._next, self._crc = record.offset, 0
        self._lock = threading.Lock()

    def feed(self, data: memoryview, offset: int) -> None:
        """Take the bytes that lie at ``offset`` of the file.

        Raises:
            Failed: the tensor is complete and its checksum is another one.
        """
        record = self._record
        with self._lock:
            if offset == record.offset:
                self._next, self._crc = offset, 0
            if offset != self._next:
                self._next = -1
                return
            self._crc = zlib.crc32(data, self._crc)
            self._next += len(data)
            differs = self._next == record.offset + record.num_bytes and self._crc != record.crc32
        if differs:
            path, name = self._what
            raise Failed(
                f"{path}: tensor {name} does not fit its checksum in {MANIFEST_FILE}; the file is damaged or of "
                f"another run; restore it, or {_STALE}."
            )


def check_files(folder: Path, share: tuple[int, int] = (0, 1)) -> int:
    """Read files that a folder's manifest lists and compare their checksums; returns the number of bytes read.

    Args:
        folder: holds the manifest; without one nothing is read.
        share: ``(i, n)`` takes every n-th file from number i on, so that n processes share the work.

    Raises:
        Failed: a file is missing or differs; the first damaged tensor is named.
    """
    records, done = read_manifest(folder), 0
    for path in sorted(records)[share[0] :: share[1]]:
        done += _check_file(folder / path, records[path])
    return done


def _check_file(path: Path, record: FileRecord) -> int:
    if not path.is_file():
        raise Failed(f"{path}: the file is missing; {MANIFEST_FILE} lists it.")
    size = path.stat().st_size
    if size != record.num_bytes:
        raise Failed(
            f"{path}: has {size} bytes, {MANIFEST_FILE} says {record.num_bytes}; the file is truncated or of another "
            "run; restore it."
        )
    if _crc(path, 0, size) != record.crc32:
        bad = [
            name for name, one in record.tensors.items() if _crc(path, one.offset, one.num_bytes) != one.crc32
        ]
        what = f"tensor {bad[0]}" + (f" and {len(bad) - 1} more" if bad[1:] else "") if bad else "the header"
        raise Failed(
            f"{path}: {what} does not fit its checksum in {MANIFEST_FILE}; the file is damaged or of another run; "
            f"restore it, or {_STALE}."
        )
    return size


def _crc(path: Path, start: int, size: int) -> int:
    """The checksum of some bytes of a file, read in blocks."""
    buffer, crc, position = memoryview(bytearray(_BLOCK_BYTES)), 0, start
    with path.open("rb", buffering=0) as file:
        while position < start + size:
            wanted = buffer[: min(_BLOCK_BYTES, start + size - position)]
            count = os.preadv(file.fileno(), [wanted], position)
            if not count:
                break
            crc, position = zlib.crc32(wanted[:count], crc), position + count
    return crc
