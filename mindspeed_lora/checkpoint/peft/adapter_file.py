"""The weights of a PEFT folder under the names that PEFT writes today.

Older PEFT and other trainers leave the ``base_model.model.`` out, or keep the adapter's name in the tensors'
(``lora_A.default.weight``); ``adapter_model.bin`` is read where there is no ``adapter_model.safetensors``.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from mindspeed_lora.checkpoint.peft.trained_tensors import PREFIX
from mindspeed_lora.checkpoint.storage.safetensors_file import SafetensorsFile, TensorEntry
from mindspeed_lora.checkpoint.storage.tensor_file import TensorFile, open_tensor_file
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families.mapping import Region

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"

MOE_SHARED = "lora_moe_shared"
"""In the metadata of our files: the experts of a layer have one pair of factors (``--lora-moe-shared``)."""

_FACTOR = re.compile(r"(.+\.lora_[AB])\.default\.weight")
_OF_THE_MODEL = re.compile(r"(model\.|lm_head\.).+")


class AdapterFile:
    """The tensors of an adapter's file by today's names."""

    def __init__(self, file: TensorFile) -> None:
        self.path: Path = file.path
        self._file = file
        self._stored: dict[str, str] = {}
        for stored in file.entries:
            name = todays_name(stored)
            if name in self._stored:
                raise Refused(
                    f"{self.path}: {stored} and {self._stored[name]} are one tensor under two names; leave one out."
                )
            self._stored[name] = stored
        self.entries: dict[str, TensorEntry] = {name: file.entries[old] for name, old in self._stored.items()}

    @property
    def is_moe_shared(self) -> bool:
        """Whether the file says that the experts of a layer have one pair of factors."""
        return isinstance(self._file, SafetensorsFile) and self._file.metadata.get(MOE_SHARED) == "true"

    def read_into(self, out: torch.Tensor, name: str, region: Region) -> None:
        """Fill ``out`` with ``region`` of a tensor."""
        self._file.read_into(out, self._stored[name], region)

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor."""
        return self._file.read(self._stored[name])


def open_adapter_file(folder: Path) -> AdapterFile:
    """The weights of a PEFT folder; safetensors where both forms are there."""
    pickled = folder / PICKLED_WEIGHTS_FILE
    use_pickled = pickled.exists() and not (folder / WEIGHTS_FILE).exists()
    return AdapterFile(open_tensor_file(pickled if use_pickled else folder / WEIGHTS_FILE))


def todays_name(stored: str) -> str:
    """The name that PEFT writes today for a tensor of an adapter's file."""
    name = PREFIX + stored if _OF_THE_MODEL.fullmatch(stored) else stored
    match = _FACTOR.fullmatch(name)
    return f"{match[1]}.weight" if match else name
