"""Reading ``torch.save`` files safely and by ranges: structure first, tensors' bytes as they are asked for.

The pickle inside is read with ``torch.load(weights_only=True)`` and an allow-list; storages stay in the
file. Each storage is checked against the zip archive's own list of records, so that a lying pickle cannot
point elsewhere.
"""

from __future__ import annotations

import argparse
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.checkpoint.safetensors_file import TensorEntry, read_region
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families.mapping import Region

_INERT = re.compile(
    r"megatron\.core(\.\w+)*\.enums\.\w+"  # enums in args: AttnBackend, ModelType
    r"|numpy(\._?core)?\.multiarray\._reconstruct|numpy\.ndarray|numpy\.dtype|_codecs\.encode"  # rng_state
    r"|signal\.Signals|pathlib\.PosixPath|_io\.BytesIO|builtins\.bytes"  # args.exit_signal, paths, _extra_state
)
"""Names in real Megatron files that nothing here needs; an inert object stands in for whatever they make."""

_LOCAL_HEADER = 30


class Inert:
    """Stands in for an object of a file that is not needed; making it does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class PtFile:
    """One ``torch.save`` file. ``content`` is what was saved, its tensors on the meta device."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            records = _records(path)
            self.content: Any = _load(path)
        except FileNotFoundError as error:
            raise Refused(f"{path}: the file is missing.") from error
        self._records = records
        self._file: int | None = None

    def entry(self, name: str, tensor: torch.Tensor) -> TensorEntry:
        """Where one of the content's tensors lies in the file; ``name`` is only for messages."""
        storage = tensor.untyped_storage()
        start = storage._checkpoint_offset
        if start is None or self._records.get(start) != storage.nbytes():
            raise Refused(f"{self.path}: damaged: the storage of {name} does not fit its record.")
        if not tensor.is_contiguous():
            raise Refused(
                f"{self.path}: {name} is stored with strides {tensor.stride()}; expected row-major."
            )
        first = start + int(tensor.storage_offset()) * tensor.dtype.itemsize
        entry = TensorEntry(tensor.dtype, tuple(tensor.shape), first)
        if first + entry.num_bytes > start + storage.nbytes():
            raise Refused(f"{self.path}: damaged: {name} reaches beyond its storage.")
        return entry

    def read_into(self, out: torch.Tensor, entry: TensorEntry, region: Region) -> None:
        """Fill ``out`` with ``region`` of a tensor."""
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        read_region(self._file, entry, out, region, self.path)

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]


def _records(path: Path) -> dict[int, int]:
    """Offset of the first byte and size of every record in the archive."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            records = {}
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise Refused(
                        f"{path}: record {info.filename} is compressed; expected a torch.save file."
                    )
                file.seek(info.header_offset)
                header = file.read(_LOCAL_HEADER)
                skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                records[info.header_offset + _LOCAL_HEADER + skip] = info.file_size
            return records
    except zipfile.BadZipFile as error:
        size = path.stat().st_size
        problem = "is empty" if size == 0 else f"of {size} bytes is no torch.save archive, or truncated"
        raise Refused(f"{path}: the file {problem}.") from error


def _load(path: Path) -> Any:
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:
        raise Refused(f"{path}: the pickle inside cannot be read ({_first_line(error)}).") from error
    refused = [name for name in unknown if name != "argparse.Namespace" and not _INERT.fullmatch(name)]
    if refused:
        raise Refused(
            f"{path}: refused, since its pickle uses {refused[0]}, which could run code; "
            "allowed are tensors, plain values and argparse.Namespace."
        )
    stand_ins: list[Any] = [(Inert, name) for name in unknown if _INERT.fullmatch(name)]
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):
            return torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        raise Refused(f"{path}: refused to load safely ({_first_line(error)}).") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().replace("Weights only load failed. ", "")
    return text.splitlines()[0][:200] if text else type(error).__name__
