"""The ``.metadata`` file of a ``torch.distributed.checkpoint``: which chunks make up each tensor, and where they lie.

It is a bare pickle of torch's classes, read as plain data (:mod:`plain_pickle`). What it says is checked before
anything is done with it: it may lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from mindspeed_lora.checkpoint.storage.plain_pickle import PickleRefused, Plain, load_plain, plain
from mindspeed_lora.errors import Refused

METADATA_FILE = ".metadata"

_DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool"
_MORE_DTYPES = "float8_e4m3fn float8_e5m2 uint16 uint32 uint64 complex64 complex128"
_ALLOWED: dict[tuple[str, str], Any] = {
    **plain(
        "torch.distributed.checkpoint.metadata",
        """Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata
        TensorProperties _MEM_FORMAT_ENCODING StorageMeta""",
    ),
    **plain("torch.distributed.checkpoint.filesystem", "_StorageInfo _StoragePrefix"),
    **plain(
        "torch.distributed.checkpoint.planner",
        "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    ),
    **plain("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties MEM_FORMAT_ENCODING"),
    **plain("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata MCoreSavePlan"),
    **plain("torch.serialization", "_get_layout"),
    **plain("torch", "device"),
    **plain("pathlib", "PosixPath WindowsPath PurePosixPath"),
    **plain("pathlib._local", "PosixPath WindowsPath"),
    **{("torch", name): getattr(torch, name) for name in f"{_DTYPES} {_MORE_DTYPES}".split()},
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
}
"""All that the metadata of torch, and of megatron-core's versions of it, consists of."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the bytes of a file that hold it as a ``torch.save`` archive."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint and its chunks."""

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class DcpMetadata:
    """What a checkpoint holds."""

    tensors: dict[str, StoredTensor]
    """The tensors that were asked for, by their keys."""
    keys: tuple[str, ...]
    """Keys of everything: tensors and objects."""


def read_metadata(folder: Path, wanted: Callable[[str], bool]) -> DcpMetadata:
    """The metadata of a checkpoint's folder; ``wanted`` tells by the keys which tensors are looked at.

    Raises:
        Refused: there is none, it holds what could run code, or it contradicts itself.
    """
    path = folder / METADATA_FILE
    try:
        content = load_plain(path.read_bytes(), _ALLOWED)
    except FileNotFoundError as error:
        raise Refused(f"{path}: the file is missing.") from error
    except PickleRefused as error:
        raise Refused(
            f"{path}: refused, since {error}; expected the metadata of a torch.distributed.checkpoint."
        ) from error
    if not isinstance(content, Plain) or content.kind not in ("Metadata", "MCoreMetadata"):
        raise Refused(f"{path}: holds no metadata of a torch.distributed.checkpoint.")
    tensors, storage = content.get("state_dict_metadata"), content.get("storage_data")
    if not isinstance(tensors, dict) or not isinstance(storage, dict):
        raise Refused(f"{path}: lacks state_dict_metadata or storage_data.")
    if not all(isinstance(key, str) for key in tensors):
        raise Refused(f"{path}: a key of state_dict_metadata is no text.")
    places = _places(storage, path, wanted)
    found = {
        key: _tensor(key, value, places, path)
        for key, value in tensors.items()
        if _is(value, "TensorStorageMetadata") and wanted(key)
    }
    return DcpMetadata(found, tuple(tensors))


_Place = tuple[str, int, int]


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, Plain) and value.kind == kind


def _places(
    storage: dict[Any, Any], path: Path, wanted: Callable[[str], bool]
) -> dict[tuple[str, tuple[int, ...]], _Place]:
    """File, first byte and length of each chunk, by key and offsets."""
    places: dict[tuple[str, tuple[int, ...]], _Place] = {}
    for index, info in storage.items():
        key = index.get("fqn") if _is(index, "MetadataIndex") else None
        if not isinstance(key, str) or not _is(info, "_StorageInfo"):
            raise Refused(f"{path}: an entry of storage_data is damaged.")
        offsets = index.get("offset")
        if offsets is None or not wanted(key):
            continue
        if info.get("transform_descriptors"):
            transforms = info.get("transform_descriptors")
            raise Refused(f"{path}: {key} is stored through {transforms}, which is not supported.")
        file, start, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if not isinstance(file, str) or Path(file).name != file:
            raise Refused(f"{path}: {key} lies in {file!r}, which is not the name of a file.")
        if not are_sizes((start, length)) or not are_sizes(offsets):
            raise Refused(f"{path}: the place of a chunk of {key} is damaged: {offsets}, {start}, {length}.")
        if (key, offsets) in places:
            raise Refused(f"{path}: the chunk of {key} at {list(offsets)} is there twice.")
        places[key, offsets] = file, start, length
    return places


def _tensor(
    key: str, value: Plain, places: dict[tuple[str, tuple[int, ...]], _Place], path: Path
) -> StoredTensor:
    size, dtype, chunks = value.get("size"), _dtype(value.get("properties")), value.get("chunks")
    if not are_sizes(size) or not isinstance(dtype, torch.dtype) or not isinstance(chunks, list):
        raise Refused(f"{path}: the entry of {key} is damaged.")
    return StoredTensor(dtype, size, tuple(_chunk(key, size, chunk, places, path) for chunk in chunks))


def _chunk(
    key: str,
    size: tuple[int, ...],
    value: Any,
    places: dict[tuple[str, tuple[int, ...]], _Place],
    path: Path,
) -> Chunk:
    offsets, sizes = (value.get("offsets"), value.get("sizes")) if isinstance(value, Plain) else (None, None)
    if not are_sizes(offsets) or not are_sizes(sizes) or not len(offsets) == len(sizes) == len(size):
        raise Refused(f"{path}: a chunk of {key}, of shape {list(size)}, is damaged: {offsets}, {sizes}.")
    if any(first + count > whole for first, count, whole in zip(offsets, sizes, size, strict=True)):
        raise Refused(
            f"{path}: a chunk of {key} at {list(offsets)} of shape {list(sizes)} reaches beyond the tensor's "
            f"shape {list(size)}."
        )
    if (key, offsets) not in places:
        raise Refused(f"{path}: tells no file for the chunk of {key} at {list(offsets)}.")
    return Chunk(offsets, sizes, *places[key, offsets])


def _dtype(properties: Any) -> Any:
    """The dtype, which the state of the properties has first, or by name."""
    if not isinstance(properties, Plain):
        return None
    return properties.state[0] if isinstance(properties.state, tuple) else properties.get("dtype")


def are_sizes(value: Any) -> TypeGuard[tuple[int, ...]]:
    """Whether a value from a pickle is a tuple of numbers of at least 0."""
    return isinstance(value, tuple) and all(type(one) is int and one >= 0 for one in value)
