"""What ``verify`` compares of a folder: its model by canonical name, its adapter by PEFT's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from mindspeed_lora.checkpoint.canonical import canonical_tensors
from mindspeed_lora.checkpoint.conversion.inspect_model import format_of
from mindspeed_lora.checkpoint.formats.mcore_files import find_iteration
from mindspeed_lora.checkpoint.peft.adapter_file import open_adapter_file
from mindspeed_lora.checkpoint.peft.config import CONFIG_FILE, AdapterConfig
from mindspeed_lora.checkpoint.peft.folder import (
    ADAPTER_FOLDER,
    find_adapter,
    read_adapter_config,
)
from mindspeed_lora.checkpoint.source import Source, open_source
from mindspeed_lora.errors import Refused
from mindspeed_lora.training.run_folder import find_saved_run

MODEL, ADAPTER = "model", "adapter"


class ModelTensors:
    """A model's tensors by canonical name."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._sizes = canonical_tensors(source.shape)

    def names(self) -> list[str]:
        """Canonical names."""
        return list(self._sizes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The unsharded shape."""
        return self._sizes[name]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that it is stored in."""
        return self.source.dtype(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of the unsharded tensor."""
        return self.source.read(name, 0, [(start, stop)])

    @property
    def may_be_padded(self) -> bool:
        """Whether the vocabulary may be counted with its padding: no config.json tells how large it is."""
        return format_of(self.source) != "hf" and self.source.config_dir is None

    def describe(self) -> str:
        """Format and layout in words."""
        layout = self.source.layout()
        cut = ""
        if layout is not None:
            virtual = f" × VPP {layout.vp_size}" if layout.vp_size > 1 else ""
            cut = f" TP {layout.tp_size} × PP {layout.pp_size}{virtual}"
            if self.source.shape.moe is not None:
                cut += f" × EP {layout.ep_size} × ETP {layout.etp_size}"
        settings = self.source.quantization
        values = "" if settings is None else f", the values of {settings}"
        return (
            f"{format_of(self.source)}{cut}, {self.source.shape.family}, {len(self._sizes)} tensors{values}"
        )


class AdapterTensors:
    """An adapter's tensors by the names in its file."""

    def __init__(self, folder: Path) -> None:
        self.config: AdapterConfig = read_adapter_config(folder)
        self.file = open_adapter_file(folder)

    def names(self) -> list[str]:
        """Names in the file."""
        return list(self.file.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the file."""
        return self.file.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in the file."""
        return self.file.entries[name].dtype

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor in the file."""
        entry = self.file.entries[name]
        region = ((start, stop), *((0, size) for size in entry.shape[1:]))
        out = torch.empty((stop - start, *entry.shape[1:]), dtype=entry.dtype)
        self.file.read_into(out, name, region)
        return out

    def describe(self) -> str:
        """Rank, alpha and size in words."""
        return f"adapter, r {self.config.r}, alpha {self.config.alpha:g}, {len(self.file.entries)} tensors"


@dataclass
class Side:
    """One folder with what can be compared of it."""

    path: Path
    parts: dict[str, ModelTensors | AdapterTensors] = field(default_factory=dict)

    def describe(self) -> str:
        """Its parts in words."""
        return " + ".join(part.describe() for part in self.parts.values())


def open_side(folder: Path) -> Side:
    """Open a checkpoint of any format, an adapter folder, or a training's folder with either or both.

    The caller has checked the checksums of its files.
    """
    side = Side(folder)
    if not folder.is_dir():
        raise Refused(
            f"verify {folder}: {'is a file; give its folder' if folder.exists() else 'no such folder'}."
        )
    saved = find_saved_run(folder)
    place = folder if saved is None else saved.folder
    if (folder / CONFIG_FILE).is_file() or (place / ADAPTER_FOLDER / CONFIG_FILE).is_file():
        side.parts[ADAPTER] = AdapterTensors(find_adapter(folder))
    if ADAPTER not in side.parts or find_iteration(place) is not None:
        side.parts[MODEL] = ModelTensors(open_source(place, flag="verify", checking=False))
    return side
