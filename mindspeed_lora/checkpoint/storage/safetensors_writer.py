"""Writing safetensors files: the header from names, dtypes and shapes alone, then the tensors in any order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mindspeed_lora.checkpoint.storage.safetensors_file import DTYPE_NAMES
from mindspeed_lora.checkpoint.storage.tensor_writer import FileLayout, TensorSpec, TensorWriter, spec_bytes


class SafetensorsLayout(FileLayout):
    """A safetensors file: a JSON header, then the tensors without gaps."""

    def __init__(self, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        # Wide dtypes first, so that all are aligned.
        self.specs = dict(sorted(specs.items(), key=lambda item: -item[1][0].itemsize))
        entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        starts: dict[str, int] = {}
        position = 0
        for name, (dtype, shape) in self.specs.items():
            end = position + spec_bytes((dtype, shape))
            entries[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [position, end],
            }
            starts[name] = position
            position = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self.offsets = {name: len(self._head) + start for name, start in starts.items()}
        self.num_bytes = len(self._head) + position

    def head(self) -> bytes:
        """The header with its length."""
        return self._head


class SafetensorsWriter(TensorWriter):
    """A safetensors file being written; its tensors may come in any order, each exactly once."""

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(path, SafetensorsLayout(specs, metadata))
