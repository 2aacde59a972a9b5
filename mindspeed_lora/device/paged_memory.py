"""Numbers for which the device's memory is too small: a few ranges of them at a time are where they are computed on.

On the CPU they lie in a temporary file that is mapped into memory, on CUDA in managed memory, whose pages the driver
moves (as the paged optimizers of QLoRA do, Dettmers et al. 2023, arXiv 2305.14314, section 3), or in pinned memory of
the host, from which the next window is copied while the present one is computed.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from mindspeed_lora.device.runtime import current_device, has_accelerator
from mindspeed_lora.device.streams import CopyStream, CudaCopyStream
from mindspeed_lora.errors import Failed

Range = tuple[int, int]
"""First element, and the one after the last."""
Window = Sequence[Range]
"""Ranges that are computed on together."""

_FP32 = 4


class PagedMemory(Protocol):
    """``[n]`` float32, zero at first."""

    @property
    def values(self) -> torch.Tensor:
        """All of them, where they stay."""
        ...

    def visit(self, windows: Sequence[Window]) -> Iterator[list[torch.Tensor]]:
        """The ranges of one window after the other, where they can be computed on in place.

        What is written to them is in :attr:`values` when the iteration has ended.
        """
        ...

    def rest(self) -> None:
        """What was read or written through :attr:`values` may leave memory."""
        ...


def paged_memory(count: int, folder: Path) -> PagedMemory:
    """Memory for ``count`` numbers of this device; ``folder`` is where a file may lie.

    Raises:
        Failed: the disk has no room for the file.
    """
    if not has_accelerator():
        return MappedMemory(count, folder)
    managed = _managed_values(count)
    return StagedMemory(count) if managed is None else ManagedMemory(managed)


class MappedMemory:
    """A file without a name: its space is taken at once, its pages leave memory when a window has been visited."""

    def __init__(self, count: int, folder: Path) -> None:
        size = max(1, count) * _FP32
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                # Not every system has it; a full disk then shows when a page is written.
                getattr(os, "posix_fallocate", _enlarge)(file.fileno(), 0, size)
                self._map = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise Failed(_no_room(size, folder, error)) from error
        self.values = (
            torch.frombuffer(self._map, dtype=torch.float32, count=count) if count else torch.empty(0)
        )

    def visit(self, windows: Sequence[Window]) -> Iterator[list[torch.Tensor]]:
        """Ranges of the mapping itself; with one window alone nothing leaves memory."""
        for number, window in enumerate(windows):
            self._advise(windows[number + 1] if number + 1 < len(windows) else (), mmap.MADV_WILLNEED)
            yield [self.values[first:last] for first, last in window]
            if len(windows) > 1:
                self._advise(window, mmap.MADV_DONTNEED)

    def rest(self) -> None:
        """Pages leave memory."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _advise(self, window: Window, advice: int) -> None:
        """Of a shared mapping, pages that are not needed stay in the file and in the system's cache of it."""
        for first, last in window:
            start = first * _FP32 // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                self._map.madvise(advice, start, last * _FP32 - start)


def _enlarge(file: int, _start: int, size: int) -> None:
    os.ftruncate(file, size)


def _no_room(size: int, folder: Path, error: OSError) -> str:
    try:
        free = f"of which {shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free"
    except OSError:
        free = "which cannot be looked into"
    return (
        f"--paged-optimizer: this rank's state takes a file of {size / 2**20:,.0f} MiB in {folder}, {free} "
        f"({error.strerror}); make room there, or name another folder with --paged-optimizer-dir"
    )


class ManagedMemory:
    """CUDA's managed memory: one address for host and device, between which the driver moves pages."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def visit(self, windows: Sequence[Window]) -> Iterator[list[torch.Tensor]]:
        """Pages come when they are touched."""
        for window in windows:
            yield [self.values[first:last] for first, last in window]

    def rest(self) -> None:
        """The driver moves pages by itself."""


class _CudaArray:
    """Memory at an address, as torch.as_tensor takes it in without copying."""

    def __init__(self, owner: torch.Tensor) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": tuple(owner.shape),
            "typestr": "<f4",
            "data": (owner.data_ptr(), False),
            "version": 3,
        }


def _managed_values(count: int) -> torch.Tensor | None:
    """Zeros in managed memory of bitsandbytes, seen as a CUDA tensor; None where it cannot give any."""
    try:
        from bitsandbytes.functional import get_paged

        owner: Any = get_paged(max(1, count), dtype=torch.float32, device=current_device())
    except Exception:  # no such package, or one that was built without CUDA
        return None
    values = torch.as_tensor(_CudaArray(owner), device=current_device())[:count]
    return values.zero_()


class StagedMemory:
    """Pinned memory of the host; two buffers of the device take turns, one being filled while the other is used."""

    def __init__(self, count: int, copies: CopyStream | None = None) -> None:
        self._copies: CopyStream = CudaCopyStream() if copies is None else copies
        self.values = torch.zeros(count, pin_memory=self._copies.pins)

    def visit(self, windows: Sequence[Window]) -> Iterator[list[torch.Tensor]]:
        """Copies of the ranges on the device, which go back while the next window is computed."""
        size = max((_length(window) for window in windows), default=0)
        buffers = [torch.empty(size, device=self._copies.device) for _ in range(min(2, len(windows)))]
        # Whatever used the buffers' memory before has to be over.
        self._copies.copied_after_use()
        near, filled = self._bring(windows[0], buffers[0]) if windows else ([], None)
        for number, window in enumerate(windows):
            present, ready = near, filled
            if number + 1 < len(windows):
                near, filled = self._bring(windows[number + 1], buffers[(number + 1) % 2])
            self._copies.used_after(ready)
            yield present
            self._copies.copied_after_use()
            with self._copies.copying():
                for (first, last), copy in zip(window, present, strict=True):
                    self.values[first:last].copy_(copy, non_blocking=True)
        self._copies.finish()

    def rest(self) -> None:
        """It is not on the device."""

    def _bring(self, window: Window, buffer: torch.Tensor) -> tuple[list[torch.Tensor], object]:
        """Starts to fill a buffer; copies follow one another, so what lay there has gone home before."""
        near, start = [], 0
        with self._copies.copying():
            for first, last in window:
                near.append(buffer[start : start + last - first])
                near[-1].copy_(self.values[first:last], non_blocking=True)
                start += last - first
            return near, self._copies.mark()


def _length(window: Window) -> int:
    return sum(last - first for first, last in window)
