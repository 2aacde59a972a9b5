"""Writing ``torch.save`` files without holding their tensors in memory.

The archive is the one that ``torch.save`` writes: an uncompressed zip with ``data.pkl``, in which each
tensor is rebuilt from a storage ``data/<n>``, and those storages, their bytes aligned to 64.
"""

from __future__ import annotations

import io
import pickle
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.checkpoint.storage.tensor_writer import FileLayout, TensorSpec, TensorWriter, spec_bytes
from mindspeed_lora.checkpoint.storage.zip_records import Record, directory

_ALIGNMENT = 64
_STORAGE_TYPES = {
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float64: torch.DoubleStorage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


class TensorSlot:
    """Stands for a tensor in the pickled content; its bytes are written later."""

    def __init__(self, key: int, spec: TensorSpec) -> None:
        self.key = key
        self.dtype, self.shape = spec

    def __reduce__(self) -> tuple[Any, ...]:
        strides: list[int] = []
        step = 1
        for size in reversed(self.shape):
            strides.insert(0, step)
            step *= size
        arguments: tuple[Any, ...] = (_StorageSlot(self), 0, self.shape, tuple(strides), False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class _StorageSlot:
    def __init__(self, tensor: TensorSlot) -> None:
        self.identity = (
            "storage",
            _STORAGE_TYPES[tensor.dtype],
            str(tensor.key),
            "cpu",
            prod(tensor.shape),
        )


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.identity if isinstance(obj, _StorageSlot) else None


class ArchiveLayout(FileLayout):
    """A ``torch.save`` archive of a pickle and of the storages of its tensors, in the order of ``specs``.

    ``base`` is where the archive begins in its file, ``stem`` the name of the folder that its records are in.
    """

    def __init__(self, stem: str, content: object, specs: Mapping[str, TensorSpec], base: int = 0) -> None:
        self.specs = dict(specs)
        pickled = io.BytesIO()
        _Pickler(pickled, protocol=2).dump(content)
        first = [("data.pkl", pickled.getvalue()), ("byteorder", b"little")]
        position, self._head = base, b""
        self._fixed: list[tuple[Record, int]] = []
        for name, data in first:
            record, crc = Record.at(f"{stem}/{name}", position, len(data), _ALIGNMENT), zlib.crc32(data)
            self._fixed.append((record, crc))
            self._head += record.header(crc) + data
            position = record.stop
        self._records: dict[str, Record] = {}
        for number, (name, spec) in enumerate(self.specs.items()):
            self._records[name] = Record.at(f"{stem}/data/{number}", position, spec_bytes(spec), _ALIGNMENT)
            position = self._records[name].stop
        self.offsets = {name: record.start for name, record in self._records.items()}
        self._version = Record.at(f"{stem}/version", position, len(_VERSION), _ALIGNMENT)
        self._base = base
        self.num_bytes = position - base + len(self.tail(dict.fromkeys(self.specs, 0)))

    def head(self) -> bytes:
        """The pickled content."""
        return self._head

    def around(self, name: str, crc: int) -> tuple[bytes, bytes]:
        """The header of the tensor's record."""
        return self._records[name].header(crc), b""

    def tail(self, crcs: Mapping[str, int]) -> bytes:
        """The last record and the central directory."""
        version = (self._version, zlib.crc32(_VERSION))
        records = [*self._fixed, *((self._records[name], crcs[name]) for name in self.specs), version]
        end = directory(
            [(_moved(record, -self._base), crc) for record, crc in records], self._version.stop - self._base
        )
        return self._version.header(version[1]) + _VERSION + end


_VERSION = b"3\n"


def _moved(record: Record, by: int) -> Record:
    """The record as an archive that begins elsewhere in its file lists it."""
    return Record(record.name, record.offset + by, record.size, record.padding)


class PtLayout(ArchiveLayout):
    """An archive of ``content`` and, under each key of ``models``, a flat dictionary of tensors.

    A tensor's name here is ``<key>/<name>``.
    """

    def __init__(
        self, stem: str, content: Mapping[str, Any], models: Mapping[str, Mapping[str, TensorSpec]]
    ) -> None:
        listed: dict[str, TensorSpec] = {}
        slots: dict[str, dict[str, TensorSlot]] = {}
        for key, specs in models.items():
            slots[key] = {}
            for name, spec in specs.items():
                slots[key][name] = TensorSlot(len(listed), spec)
                listed[f"{key}/{name}"] = spec
        super().__init__(stem, {**content, **slots}, listed)


class PtWriter(TensorWriter):
    """A ``torch.save`` file being written; a tensor's name is ``<key of its model>/<name>``."""

    def __init__(
        self, path: Path, content: Mapping[str, Any], models: Mapping[str, Mapping[str, TensorSpec]]
    ) -> None:
        super().__init__(path, PtLayout(path.stem, content, models))
