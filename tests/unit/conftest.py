"""Process groups for unit tests: of this process alone, and of the pool's processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.parallel.groups import ParallelGroups, destroy_groups, initialize_groups
from tests.support.pool import WorkerPool


@pytest.fixture
def groups() -> Iterator[ParallelGroups]:
    """The groups of a world of this one process."""
    made, _ = initialize_groups(ParallelConfig(), seed=1)
    try:
        yield made
    finally:
        destroy_groups()


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Processes for tests of several ranks."""
    made = WorkerPool()
    try:
        yield made
    finally:
        made.close()
