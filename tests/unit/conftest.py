"""Process groups for tests in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.parallel.groups import ParallelGroups, destroy_groups, initialize_groups


@pytest.fixture
def groups() -> Iterator[ParallelGroups]:
    """The groups of a world of this one process."""
    made, _ = initialize_groups(ParallelConfig(), seed=1)
    try:
        yield made
    finally:
        destroy_groups()
