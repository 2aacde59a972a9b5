"""Where canonical tensors come from: the one interface of all readable formats, and finding the format.

Formats fill buffers; :class:`CheckpointSource` turns requests (a whole tensor, or ranges of one axis) into
those buffers, and gives zeros for the rows that pad the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from mindspeed_lora.checkpoint.canonical import VOCABULARY_TENSORS, canonical_tensors
from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families.segments import Range
from mindspeed_lora.quantization.matrix import QuantizedMatrix


@dataclass(frozen=True)
class StoredPart:
    """One tensor in a file that a canonical tensor is made of."""

    name: str
    """Its name in the file."""
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredLayout:
    """How a checkpoint's files are cut over ranks."""

    tp_size: int
    pp_size: int
    stages: tuple[tuple[tuple[int, ...], ...], ...]
    """The layers of each pipeline rank, by virtual stage."""
    noop_slots: tuple[int, ...] = ()
    """Places of the no-op layers among the layers as the model is built."""
    padded_vocab_size: int | None = None
    """Rows of the vocabulary tensors in the files."""
    ep_size: int = 1
    """Blocks that the experts are cut into."""
    etp_size: int = 1
    """Ranks that each expert's matrices are cut over."""

    @property
    def vp_size(self) -> int:
        """Virtual stages of each pipeline rank."""
        return max(map(len, self.stages), default=1)


@dataclass(frozen=True)
class Origin:
    """The Hugging Face model that weights come from, however often they were converted since."""

    path: str
    hub_id: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """What ``base_model_name_or_path`` of an adapter says: the hub id if there is one, else the path."""
        return self.hub_id or self.path


class Source(Protocol):
    """A checkpoint that can be read by canonical names."""

    shape: ModelShape
    path: Path
    origin: Origin | None
    """The Hugging Face model behind the weights, if it is known."""
    config_dir: Path | None
    """The folder with config.json and the tokenizer files, if there is one."""
    manifest_folder: Path | None
    """The folder whose ``checksums.json`` what is read is compared with, if there is one."""
    quantization: QuantSettings | None
    """How the linears are quantised; None: they are plain."""

    @property
    def hf_origin(self) -> str | None:
        """Path or hub id of the Hugging Face model that the weights came from."""

    def names(self) -> list[str]:
        """Canonical names of all tensors."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in."""

    def parts(self, name: str) -> list[StoredPart]:
        """The tensors in files that a canonical tensor is made of; none where it is computed."""

    def layout(self) -> StoredLayout | None:
        """How the files are cut over ranks; None where they are not."""

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored quantised; from headers alone."""

    def quantized(self, name: str) -> list[QuantizedMatrix] | None:
        """The whole Hugging Face matrices that a linear's weight is made of, in the order of the family's table.

        None where it is stored plain. :meth:`read` gives the values that they stand for.
        """

    def read(self, name: str, axis: int | None = None, ranges: Sequence[Range] | None = None) -> torch.Tensor:
        """The canonical tensor, or the concatenation of its ``ranges`` along ``axis``.

        Only the bytes that are needed are read. Ranges past the vocabulary's end give zero rows.
        """


class CheckpointSource:
    """The part of :class:`Source` that all formats share; a format adds ``dtype`` and ``_fill``."""

    manifest_folder: Path | None = None
    quantization: QuantSettings | None = None

    def __init__(self, path: Path, shape: ModelShape, origin: Origin | None, config_dir: Path | None) -> None:
        self.path = path
        self.shape = shape
        self.origin = origin
        self.config_dir = config_dir
        self.tensors = canonical_tensors(shape)

    @property
    def hf_origin(self) -> str | None:
        """Path or hub id of the Hugging Face model that the weights came from."""
        return self.origin.name if self.origin else None

    def names(self) -> list[str]:
        """Canonical names of all tensors."""
        return list(self.tensors)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in."""
        raise NotImplementedError

    def parts(self, name: str) -> list[StoredPart]:
        """The tensors in files that a canonical tensor is made of; none where it is computed."""
        return []

    def layout(self) -> StoredLayout | None:
        """How the files are cut over ranks; None where they are not."""
        return None

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored quantised; from headers alone."""
        return False

    def quantized(self, name: str) -> list[QuantizedMatrix] | None:
        """The whole Hugging Face matrices that a linear's weight is made of; None where it is stored plain."""
        return None

    def read(self, name: str, axis: int | None = None, ranges: Sequence[Range] | None = None) -> torch.Tensor:
        """The canonical tensor, or the concatenation of its ``ranges`` along ``axis``."""
        full = self.tensors[name]
        wanted: list[Sequence[Range]] = [((0, size),) for size in full]
        if axis is not None and ranges is not None:
            wanted[axis] = ranges
        size = tuple(sum(stop - start for start, stop in axis_ranges) for axis_ranges in wanted)
        if name in VOCABULARY_TENSORS and max(stop for _, stop in wanted[0]) > full[0]:
            return self._read_padded(name, wanted, size)
        out = torch.empty(size, dtype=self.dtype(name))
        self._fill(out, name, wanted)
        return out

    def _read_padded(self, name: str, wanted: list[Sequence[Range]], size: tuple[int, ...]) -> torch.Tensor:
        out = torch.zeros(size, dtype=self.dtype(name))
        rows, at = self.tensors[name][0], 0
        for start, stop in wanted[0]:
            last = min(stop, rows)
            if start < last:
                self._fill(out[at : at + last - start], name, [((start, last),), *wanted[1:]])
            at += stop - start
        return out

    def _fill(self, out: torch.Tensor, name: str, wanted: Sequence[Sequence[Range]]) -> None:
        """Fill ``out`` with the wanted ranges (per axis) of a canonical tensor, all within its bounds."""
        raise NotImplementedError


def open_source(
    path: str | Path,
    kind: str | None = None,
    config_dir: Path | None = None,
    flag: str = "--load",
    checking: bool = True,
    headers_only: bool = False,
) -> Source:
    """Open a checkpoint: a Hugging Face folder or a Megatron one, as ``kind`` says or as is found.

    ``config_dir`` is a folder whose config.json describes a Megatron checkpoint that keeps none beside it;
    ``flag`` is the one that named the path. With ``checking``, what is read is compared with the checksums that the
    conversion left beside it, if it did; with ``headers_only`` nothing is checked that needs the weights.

    Raises:
        Refused: there is no such checkpoint, or its description cannot be read.
    """
    # The formats build on this module.
    from mindspeed_lora.checkpoint.formats import hf, mcore, mcore_files, torch_dist

    folder = Path(path)
    if not folder.is_dir():
        found = (
            "is a file; give its folder" if folder.exists() else "no such folder; expected a checkpoint there"
        )
        raise Refused(f"{flag} {folder}: {found}.")
    is_hf = (folder / "config.json").is_file()
    is_mg = mcore_files.find_iteration(folder) is not None
    if kind == "hf" or (kind is None and is_hf):
        if not is_hf:
            raise Refused(f"{flag} {folder}: not a Hugging Face model (no config.json).")
        return hf.HfSource(folder, checking, headers_only)
    if kind == "torch_dist" or (not is_mg and torch_dist.find_iteration(folder) is not None):
        return torch_dist.TorchDistSource(folder, config_dir, checking)
    if kind == "mg" or is_mg:
        return mcore.McoreSource(folder, config_dir, checking)
    if next(folder.glob("**/adapter_config.json"), None):
        raise Refused(
            f"{flag} {folder}: holds an adapter only; give it to --lora-load, beside its base model."
        )
    raise Refused(
        f"{flag} {folder}: neither a Hugging Face model (config.json) nor a Megatron checkpoint "
        "(iter_*/mp_rank_* or iter_*/*.distcp)."
    )
