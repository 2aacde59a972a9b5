"""What the C library's heap keeps, and gives back."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from tests.support.pool import WorkerPool

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="C libraries other than glibc from 2.33 on are left alone",
)
MIB = 2**20


@pytest.fixture
def fresh() -> Iterator[WorkerPool]:
    """A process whose heap holds nothing of other tests."""
    pool = WorkerPool()
    yield pool
    pool.close()


def _resident_sizes(gibibytes: float) -> list[int]:
    import torch

    from mindspeed_lora.device import bind_device, release_freed_memory, resident_memory_bytes

    bind_device()
    tensors = [torch.ones(MIB) for _ in range(int(gibibytes * 256))]
    sizes = [resident_memory_bytes()]
    tensors.clear()
    sizes.append(resident_memory_bytes())
    release_freed_memory()
    return [*sizes, resident_memory_bytes()]


def test_freed_memory_stays_until_it_is_a_gibibyte(fresh: WorkerPool) -> None:
    [[full, freed, released]] = fresh.run(1, _resident_sizes, 0.5)
    assert full - freed < 64 * MIB and freed - released < 64 * MIB


def test_more_than_a_gibibyte_is_given_back(fresh: WorkerPool) -> None:
    [[full, freed, released]] = fresh.run(1, _resident_sizes, 1.25)
    assert full - freed < 64 * MIB and freed - released > 1024 * MIB
