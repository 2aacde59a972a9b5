"""Memory that pages: what is written in a window is there afterwards, whichever way it travels."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mindspeed_lora.device.paged_memory import MappedMemory, PagedMemory, StagedMemory, Window, paged_memory
from mindspeed_lora.device.runtime import resident_memory_bytes
from mindspeed_lora.errors import Failed

WINDOWS: list[Window] = [[(0, 100), (160, 200)], [(100, 160)], [(200, 1000)], [(1000, 1001), (1001, 1001)]]
COUNT = 1001


class HostCopies:
    """A stream of the host: copies are made at once; what was asked for, and what would have waited, is noted."""

    pins = False
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[str] = []

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        self.asked.append("copy")
        yield

    def mark(self) -> object:
        return len(self.asked)

    def used_after(self, mark: object) -> None:
        self.asked.append(f"use after {mark}")

    def copied_after_use(self) -> None:
        self.asked.append("copy after use")

    def finish(self) -> None:
        self.asked.append("finish")


MEMORIES: dict[str, Callable[[Path], PagedMemory]] = {
    "mapped": lambda folder: MappedMemory(COUNT, folder),
    "staged": lambda folder: StagedMemory(COUNT, HostCopies()),
}


@pytest.mark.parametrize("kind", MEMORIES)
def test_what_a_window_gets_stays(kind: str, tmp_path: Path) -> None:
    memory = MEMORIES[kind](tmp_path)
    assert memory.values.dtype is torch.float32 and not memory.values.any() and len(memory.values) == COUNT
    expected = torch.zeros(COUNT)
    for turn in range(3):
        for window, near in zip(WINDOWS, memory.visit(WINDOWS), strict=True):
            for (first, last), values in zip(window, near, strict=True):
                assert torch.equal(values, expected[first:last]), turn
                values += torch.arange(first, last) + turn
                expected[first:last] += torch.arange(first, last) + turn
        memory.rest()
        assert torch.equal(memory.values, expected)


def test_numbers_travel_a_window_ahead_and_each_waits_for_its_own() -> None:
    """Copies follow one another: in, in, (first out, third in), … Only the first may be used before the second."""
    copies = HostCopies()
    for number, _ in enumerate(StagedMemory(30, copies).visit([[(0, 10)], [(10, 20)], [(20, 30)]])):
        copies.asked.append(f"window {number}")
    assert copies.asked == [
        *("copy after use", "copy", "copy", "use after 2", "window 0", "copy after use", "copy"),
        *("copy", "use after 3", "window 1", "copy after use", "copy"),
        *("use after 8", "window 2", "copy after use", "copy", "finish"),
    ]


def test_a_window_that_was_visited_leaves_memory(tmp_path: Path) -> None:
    count = 16 << 20
    memory = MappedMemory(count, tmp_path)
    size = count // 8
    windows = [[(first, first + size)] for first in range(0, count, size)]
    before = resident_memory_bytes()
    for near in memory.visit(windows):
        near[0].fill_(1.0)
        assert resident_memory_bytes() - before < 2 * size * 4
    assert resident_memory_bytes() - before < size * 4
    assert memory.values.min() == 1.0


def test_its_file_has_no_name_and_takes_its_room_at_once(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    memory = paged_memory(8 << 20, tmp_path)
    assert isinstance(memory, MappedMemory) and not list(tmp_path.iterdir())
    taken = free - os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert taken > 16 << 20, "others write here too, but not so much at once"


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may become larger than a mebibyte."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_files")
def test_no_room_is_told_with_the_folder(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"--paged-optimizer: .* 4 MiB in .*--paged-optimizer-dir"):
        MappedMemory(1 << 20, tmp_path)
    with pytest.raises(Failed, match="--paged-optimizer-dir"):
        MappedMemory(1, tmp_path / "missing")
