"""Writing a safetensors file tensor by tensor: the header first, from names, dtypes and shapes alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType

import torch

from mindspeed_lora.checkpoint.safetensors_file import DTYPE_NAMES

TensorSpec = tuple[torch.dtype, tuple[int, ...]]


def spec_bytes(spec: TensorSpec) -> int:
    """Bytes that a tensor takes in a file."""
    dtype, shape = spec
    return prod(shape) * dtype.itemsize


class SafetensorsWriter:
    """A safetensors file being written; its tensors may come in any order, each exactly once."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.path = path
        self.specs = dict(specs)
        header, offsets, size = _layout(self.specs)
        self._offsets = {name: len(header) + offset for name, offset in offsets.items()}
        self._pending = set(self.specs)
        self.num_bytes = len(header) + size
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        _write_at(self._file, memoryview(header), 0)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor; its dtype and shape must be those announced."""
        dtype, shape = self.specs[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: got {tensor.dtype} {list(tensor.shape)}, announced {dtype} {list(shape)}"
            )
        self._pending.remove(name)
        if tensor.numel():
            flat = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            _write_at(self._file, memoryview(flat), self._offsets[name])  # type: ignore[arg-type]

    def close(self) -> None:
        """End the file; every announced tensor must have been written."""
        if self._pending:
            raise ValueError(f"{self.path}: never written: {', '.join(sorted(self._pending)[:3])}")
        os.fsync(self._file)
        os.close(self._file)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            os.close(self._file)


def _layout(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int], int]:
    """Header bytes, and each tensor's offset after them; wide dtypes first, so that all are aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    position = 0
    for name, (dtype, shape) in sorted(specs.items(), key=lambda item: -item[1][0].itemsize):
        end = position + spec_bytes((dtype, shape))
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        offsets[name] = position
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets, position


def _write_at(file: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)
