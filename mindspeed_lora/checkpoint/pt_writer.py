"""Writing a ``torch.save`` file tensor by tensor, without holding its tensors in memory.

The archive is the one that ``torch.save`` writes: an uncompressed zip with ``data.pkl``, in which each
tensor is rebuilt from a storage ``data/<n>``, and those storages, their bytes aligned to 64.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mindspeed_lora.checkpoint.safetensors_writer import TensorSpec, spec_bytes

_ALIGNMENT = 64
_LOCAL_HEADER = 30
_ZIP64_EXTRA = 20
_STORAGE_TYPES = {
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
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


class PtWriter:
    """A file being written: ``content`` and, under each key of ``models``, a flat dictionary of tensors.

    The tensors are written in the order of their specs, model by model.
    """

    def __init__(
        self, path: Path, content: Mapping[str, Any], models: Mapping[str, Mapping[str, TensorSpec]]
    ) -> None:
        self.path = path
        self._specs = [entry for specs in models.values() for entry in specs.items()]
        self._next = 0
        self._file = path.open("wb")
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)
        numbers = count()
        slots = {
            key: {name: TensorSlot(next(numbers), spec) for name, spec in specs.items()}
            for key, specs in models.items()
        }
        pickled = io.BytesIO()
        _Pickler(pickled, protocol=2).dump({**content, **slots})
        self._record("data.pkl", pickled.getvalue())
        self._record("byteorder", b"little")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor; it must be the next one of the specs."""
        expected, (dtype, shape) = self._specs[self._next]
        if (name, tensor.dtype, tuple(tensor.shape)) != (expected, dtype, shape):
            raise ValueError(
                f"got {name} {tensor.dtype} {list(tensor.shape)}, expected {expected} {dtype} {list(shape)}"
            )
        data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self._record(f"data/{self._next}", data)
        self._next += 1

    def _record(self, name: str, data: bytes | memoryview) -> None:
        """Add a record whose bytes start at a multiple of the alignment, as torch's own do."""
        info = zipfile.ZipInfo(f"{self.path.stem}/{name}")
        info.file_size = len(data)
        start = self._file.tell() + _LOCAL_HEADER + len(info.filename.encode()) + _ZIP64_EXTRA
        padding = -(start + 4) % _ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        with self._archive.open(info, "w", force_zip64=True) as record:
            record.write(data)

    def close(self) -> None:
        """End the file; every announced tensor must have been written."""
        if self._next != len(self._specs):
            raise ValueError(f"{self.path}: never written: {self._specs[self._next][0]}")
        self._record("version", b"3\n")
        self._archive.close()
        self._file.close()

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec_bytes(spec) for _, spec in self._specs)

    def __enter__(self) -> PtWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        # An archive that is not closed complains when it is collected.
        with suppress(OSError, ValueError):
            self._archive.close()
        with suppress(OSError):
            self._file.close()
