"""The older form of ``torch.save`` files: pickles one after the other, then the storages.

::

    magic number, protocol, machine    three pickles
    content                            a pickle whose persistent ids name storages
    keys of the storages               a pickle, in the order of the file
    for each key: 8 bytes count of its elements, little-endian, then their bytes

So the place of every storage follows without reading one.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._weights_only_unpickler import Unpickler, get_globals_in_pkl

from mindspeed_lora.checkpoint.storage.pt_pickle import check_globals, not_safe, only_allowed, unreadable
from mindspeed_lora.errors import Refused

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
"""The first bytes of such a file."""

_PROTOCOL = 1001
_NUM_HEADERS = 3


def load_legacy(path: Path) -> tuple[Any, dict[int, int]]:
    """The content, its tensors on the meta device, and the size of each storage by its first byte's offset."""
    with path.open("rb") as file:
        try:
            names = {name for _ in range(_NUM_HEADERS + 2) for name in get_globals_in_pkl(file)}
        except Exception as error:
            raise unreadable(path, error) from error
        check_globals(names, path)
        file.seek(0)
        storages = _Storages(path, os.fstat(file.fileno()).st_size)
        try:
            with only_allowed(names):
                headers = [_unpickle(file, storages) for _ in range(_NUM_HEADERS)]
                content = _unpickle(file, storages)
                keys = _unpickle(file, storages)
        except Refused:
            raise
        except Exception as error:
            raise not_safe(path, error) from error
        if headers[1] != _PROTOCOL or not isinstance(keys, list):
            raise Refused(f"{path}: damaged: its header is not that of a torch.save file.")
        return content, storages.place(file, keys)


def _unpickle(file: BinaryIO, storages: _Storages) -> Any:
    """The next pickle of the file, read by torch's weights-only unpickler."""
    unpickler = Unpickler(file, encoding="utf-8")
    unpickler.persistent_load = storages.load  # type: ignore[method-assign]
    return unpickler.load()


class _Storages:
    """The storages that a content names: made without memory, and found in the file afterwards."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._by_key: dict[str, torch.storage.TypedStorage] = {}

    def load(self, saved_id: Any) -> torch.storage.TypedStorage:
        """The storage of a persistent id."""
        try:
            _, storage_type, key, _, numel, view = saved_id
            dtype, nbytes = storage_type.dtype, int(numel) * storage_type.dtype.itemsize
        except (TypeError, ValueError, AttributeError) as error:
            raise Refused(f"{self.path}: damaged: {saved_id!r} is no storage.") from error
        if view is not None:
            raise Refused(
                f"{self.path}: storage {key} is a view of another one, as torch before 0.4 wrote them; "
                "save the file anew with torch.save."
            )
        if not 0 <= nbytes <= self.size:
            raise Refused(
                f"{self.path}: damaged: storage {key} claims {nbytes} bytes of a file of {self.size}."
            )
        if key not in self._by_key:
            self._by_key[key] = torch.storage.TypedStorage(
                wrap_storage=torch.UntypedStorage(nbytes, device="meta"), dtype=dtype, _internal=True
            )
        return self._by_key[key]

    def place(self, file: BinaryIO, keys: list[str]) -> dict[int, int]:
        """Tell each storage where it lies; returns their sizes by offset."""
        sizes, position = {}, file.tell()
        for key in keys:
            storage = self._by_key.get(key)
            if storage is None:
                raise Refused(f"{self.path}: damaged: nothing uses its storage {key}.")
            file.seek(position)
            count = int.from_bytes(file.read(8), "little")
            untyped = storage.untyped()
            if count * storage.dtype.itemsize != untyped.nbytes():
                raise Refused(
                    f"{self.path}: damaged: storage {key} has {count} elements, its pickle another count."
                )
            position += 8
            untyped._checkpoint_offset = position
            sizes[position] = untyped.nbytes()
            position += untyped.nbytes()
        if position > self.size:
            raise Refused(
                f"{self.path}: the file of {self.size} bytes ends before byte {position}; it is truncated."
            )
        return sizes
