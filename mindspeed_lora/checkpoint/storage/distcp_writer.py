"""The layout of a ``.distcp`` file, and the ``.metadata`` that says which chunk of which tensor lies where.

Each chunk is an archive as ``torch.save`` writes it for one tensor; objects are archives too, and come first.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_lora.checkpoint.storage.dcp_metadata import METADATA_FILE, Chunk, StoredTensor
from mindspeed_lora.checkpoint.storage.pt_writer import ArchiveLayout, TensorSlot
from mindspeed_lora.checkpoint.storage.tensor_writer import FileLayout, TensorSpec

_STEM = "archive"
"""The folder in an archive that was saved to a stream."""


@dataclass(frozen=True)
class ChunkPlan:
    """A chunk that will be written: what it is of its tensor."""

    key: str
    offsets: tuple[int, ...]
    spec: TensorSpec
    """Dtype and the chunk's own shape."""

    @property
    def name(self) -> str:
        """Its name in the file's layout."""
        return f"{self.key} at {', '.join(map(str, self.offsets))}"


class DistcpLayout(FileLayout):
    """A file of objects, each standing for None, and of chunks, one archive after the other."""

    def __init__(self, objects: Sequence[str], chunks: Sequence[ChunkPlan]) -> None:
        self.chunks = tuple(chunks)
        self.specs = {chunk.name: chunk.spec for chunk in chunks}
        head = bytearray()
        self.object_places: dict[str, tuple[int, int]] = {}
        """First byte and length of each object, by its key."""
        for key in objects:
            # A list, since a rank may have several objects under one key.
            archive = ArchiveLayout(_STEM, [None], {}, base=len(head))
            self.object_places[key] = len(head), archive.num_bytes
            head += archive.head() + archive.tail({})
        self._head = bytes(head)
        position = len(self._head)
        self._archives: dict[str, ArchiveLayout] = {}
        self.chunk_places: dict[str, tuple[int, int]] = {}
        """First byte and length of each chunk, by its name."""
        for name, spec in self.specs.items():
            archive = ArchiveLayout(_STEM, TensorSlot(0, spec), {name: spec}, base=position)
            self._archives[name] = archive
            self.chunk_places[name] = position, archive.num_bytes
            position += archive.num_bytes
        self.offsets = {name: archive.offsets[name] for name, archive in self._archives.items()}
        self.num_bytes = position

    def head(self) -> bytes:
        """The objects."""
        return self._head

    def around(self, name: str, crc: int) -> tuple[bytes, bytes]:
        """The rest of the chunk's archive."""
        archive = self._archives[name]
        before, after = archive.around(name, crc)
        return archive.head() + before, after + archive.tail({name: crc})


def stored_tensors(
    sizes: Mapping[str, tuple[int, ...]], files: Mapping[str, DistcpLayout]
) -> dict[str, StoredTensor]:
    """What a checkpoint of these files holds; ``sizes`` has each key's full size, ``files`` are by name."""
    chunks: dict[str, list[Chunk]] = {key: [] for key in sizes}
    dtypes = {}
    for file, layout in files.items():
        for planned in layout.chunks:
            dtype, shape = planned.spec
            place = layout.chunk_places[planned.name]
            chunks[planned.key].append(Chunk(planned.offsets, shape, file, *place))
            dtypes[planned.key] = dtype
    return {
        key: StoredTensor(dtypes[key], size, tuple(sorted(chunks[key], key=lambda one: one.offsets)))
        for key, size in sizes.items()
    }


def write_metadata(
    folder: Path, tensors: Mapping[str, StoredTensor], objects: Mapping[str, tuple[str, int, int]]
) -> None:
    """Write ``.metadata`` with torch's classes; ``objects`` has file, first byte and length by key."""
    # Over a second to import, and only needed here.
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

    described: dict[str, Any] = {key: BytesStorageMetadata() for key in objects}
    places: dict[Any, Any] = {MetadataIndex(key): _StorageInfo(*place) for key, place in objects.items()}
    for key, tensor in tensors.items():
        described[key] = _described(tensor)
        for chunk in tensor.chunks:
            index = MetadataIndex(key, chunk.offsets)
            places[index] = _StorageInfo(chunk.file, chunk.start, chunk.length)
    with (folder / METADATA_FILE).open("wb") as file:
        pickle.dump(Metadata(described, storage_data=places), file)


def _described(tensor: StoredTensor) -> Any:
    import torch
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        TensorProperties,
        TensorStorageMetadata,
    )

    chunks: Iterable[Any] = (
        ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in tensor.chunks
    )
    properties = TensorProperties(dtype=tensor.dtype)
    return TensorStorageMetadata(properties, torch.Size(tensor.size), list(chunks))
