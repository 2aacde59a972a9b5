"""Reading ``torch.save`` files safely and by ranges: structure first, tensors' bytes as they are asked for.

The pickle inside is read by torch's weights-only unpickler and an allow-list; storages stay in the file. Each storage
is checked against the zip archive's own list of records (in the older form: against the counts before the storages),
and these against the file's size, so that a lying pickle can neither point elsewhere nor make anything allocate.
"""

from __future__ import annotations

import os
import threading
import zipfile
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.checkpoint.storage.manifest import TensorCheck, record_of
from mindspeed_lora.checkpoint.storage.pt_legacy import MAGIC, load_legacy
from mindspeed_lora.checkpoint.storage.pt_pickle import load_archive
from mindspeed_lora.checkpoint.storage.safetensors_file import TensorEntry, read_region
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families.mapping import Region

_LOCAL_HEADER = 30


class PtFile:
    """One ``torch.save`` file. ``content`` is what was saved, its tensors on the meta device."""

    def __init__(self, path: Path, checking: bool = True) -> None:
        self.path = path
        record = record_of(path) if checking else None
        self._checks = (
            {one.offset: TensorCheck(path, name, one) for name, one in record.tensors.items()}
            if record
            else {}
        )
        try:
            with path.open("rb") as file:
                is_legacy = file.read(len(MAGIC)) == MAGIC
            self.content: Any
            if is_legacy:
                self.content, self._records = load_legacy(path)
            else:
                self._records = _records(path)
                self.content = load_archive(path)
        except FileNotFoundError as error:
            raise Refused(f"{path}: the file is missing.") from error
        self._file: int | None = None
        self._opening = threading.Lock()

    def entry(self, name: str, tensor: torch.Tensor) -> TensorEntry:
        """Where one of the content's tensors lies in the file; ``name`` is only for messages."""
        storage = tensor.untyped_storage()
        start = storage._checkpoint_offset
        if start is None or self._records.get(start) != storage.nbytes():
            raise Refused(f"{self.path}: damaged: the storage of {name} does not fit its record.")
        if tensor.is_neg() or tensor.is_conj():
            raise Refused(
                f"{self.path}: {name} is stored as a negated or conjugated view; save it anew as a copy."
            )
        if not tensor.is_contiguous():
            raise Refused(
                f"{self.path}: {name} is stored with strides {tensor.stride()}; expected row-major."
            )
        first = start + int(tensor.storage_offset()) * tensor.dtype.itemsize
        entry = TensorEntry(tensor.dtype, tuple(tensor.shape), first)
        if first < start or first + entry.num_bytes > start + storage.nbytes():
            raise Refused(f"{self.path}: damaged: {name} reaches beyond its storage.")
        return entry

    def read_into(self, out: torch.Tensor, entry: TensorEntry, region: Region) -> None:
        """Fill ``out`` with ``region`` of a tensor."""
        with self._opening:
            if self._file is None:
                self._file = os.open(self.path, os.O_RDONLY)
        read_region(self._file, entry, out, region, self.path, self._checks.get(entry.offset))

    def __del__(self) -> None:
        # Where Python itself ends its modules may be gone; the system closes the file then.
        if os is not None and getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]


def _records(path: Path) -> dict[int, int]:
    """Offset of the first byte and size of every record in the archive."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            records: dict[int, int] = {}
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise Refused(
                        f"{path}: record {info.filename} is compressed; expected a torch.save file."
                    )
                file.seek(info.header_offset)
                header = file.read(_LOCAL_HEADER)
                skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                records[info.header_offset + _LOCAL_HEADER + skip] = info.file_size
            _check_places(records, path)
            return records
    except zipfile.BadZipFile as error:
        size = path.stat().st_size
        problem = "is empty" if size == 0 else f"of {size} bytes is no torch.save archive, or truncated"
        raise Refused(f"{path}: the file {problem}.") from error


def _check_places(records: dict[int, int], path: Path) -> None:
    """The records lie one after the other within the file."""
    end, size = 0, path.stat().st_size
    for start in sorted(records):
        if start < end:
            raise Refused(f"{path}: damaged: the record at byte {start} overlaps the one before it.")
        end = start + records[start]
    if end > size:
        raise Refused(f"{path}: damaged: its records claim {end} bytes, the file has {size}.")
