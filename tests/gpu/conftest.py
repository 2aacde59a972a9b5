"""Every test here is a function of a pool of processes: one whose processes see the CUDA device, and one of the CPU.

So each of them runs on every machine, and on CUDA where that is there. What is compared with is always computed by
processes that see no CUDA device.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mindspeed_lora.checkpoint.formats.hf import shape_of
from tests.gpu.rank import cuda_device
from tests.support.adapters import new_adapter, write
from tests.support.pool import WorkerPool
from tests.support.tiny import Tiny


@pytest.fixture(scope="session")
def cuda_pool() -> Iterator[WorkerPool]:
    """Processes on the CUDA device."""
    if torch.version.cuda is None:
        pytest.skip(f"torch {torch.__version__} is built without CUDA")
    pool = WorkerPool(cuda=True)
    try:
        if pool.run(1, cuda_device)[0] is None:
            pytest.skip("there is no CUDA device")
        yield pool
    finally:
        pool.close()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device_pool(request: pytest.FixtureRequest, workers: WorkerPool) -> WorkerPool:
    """The processes of the device under test."""
    pool: WorkerPool = workers if request.param == "cpu" else request.getfixturevalue("cuda_pool")
    return pool


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Path:
    """An adapter whose every factor is random: with B zero, A would have no gradient."""
    folder = tmp_path_factory.mktemp("adapter")
    shape = shape_of(tiny.model)
    write(folder, shape, new_adapter(shape))
    return folder
