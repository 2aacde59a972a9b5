"""A file of named tensors, read by ranges: safetensors, or a state dict that ``torch.save`` wrote (``.bin``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from mindspeed_lora.checkpoint.storage.pt_file import PtFile
from mindspeed_lora.checkpoint.storage.safetensors_file import SafetensorsFile, TensorEntry
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families.mapping import Region


class TensorFile(Protocol):
    """Named tensors of one file, or of what is read like one."""

    @property
    def path(self) -> Path:
        """The file or folder, for messages."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Dtype and shape of each tensor."""

    def read_into(self, out: torch.Tensor, name: str, region: Region) -> None:
        """Fill ``out`` with ``region`` of a tensor."""

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor."""


class BinFile:
    """A state dict in a ``torch.save`` file, loaded safely and read by ranges."""

    def __init__(self, path: Path, checking: bool = True) -> None:
        self.path = path
        self._file = PtFile(path, checking)
        if not isinstance(self._file.content, dict):
            raise Refused(f"{path}: holds a {type(self._file.content).__name__}; expected named tensors.")
        self.entries: dict[str, TensorEntry] = {}
        # The method of dict itself: a pickle can put an attribute of this name on an OrderedDict.
        for name, tensor in dict.items(self._file.content):
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise Refused(
                    f"{path}: entry {name!r} is no tensor ({type(tensor).__name__}); expected named tensors alone."
                )
            self.entries[name] = self._file.entry(name, tensor)

    def read_into(self, out: torch.Tensor, name: str, region: Region) -> None:
        """Fill ``out`` with ``region`` of a tensor."""
        self._file.read_into(out, self.entries[name], region)

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor."""
        entry = self.entries[name]
        out = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(out, name, tuple((0, size) for size in entry.shape) or ((0, 1),))
        return out


def open_tensor_file(path: Path, checking: bool = True) -> SafetensorsFile | BinFile:
    """Open a file by the form that its name tells."""
    return SafetensorsFile(path, checking) if path.suffix == ".safetensors" else BinFile(path, checking)
