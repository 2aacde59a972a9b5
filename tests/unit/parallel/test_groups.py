"""A world of one process, and peers that are not there."""

from __future__ import annotations

import time

import pytest

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.errors import Failed
from mindspeed_lora.parallel.groups import ParallelGroups, destroy_groups, initialize_groups
from tests.support.pool import free_port


def test_without_a_launcher_the_world_is_this_process(groups: ParallelGroups) -> None:
    assert (groups.world_size, groups.tp_size, groups.pp_size, groups.dp_size) == (1, 1, 1, 1)
    assert (groups.rank, groups.tp_rank, groups.pp_rank, groups.dp_rank) == (0, 0, 0, 0)
    assert groups.is_first_stage and groups.is_last_stage and groups.is_main


def test_groups_can_be_made_anew() -> None:
    for _ in range(2):
        groups, notices = initialize_groups(ParallelConfig(), seed=3)
        assert groups.world_size == 1 and notices == []
        destroy_groups()


def test_nccl_without_cuda_is_one_notice() -> None:
    _, notices = initialize_groups(ParallelConfig(distributed_backend="nccl"), seed=3)
    destroy_groups()
    assert len(notices) == 1 and "gloo" in notices[0]


def test_peers_that_do_not_come_are_told_within_the_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(free_port())
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    started = time.monotonic()
    with pytest.raises(Failed, match=rf"2 processes.*MASTER_ADDR=127.0.0.1.*MASTER_PORT={port}"):
        initialize_groups(ParallelConfig(distributed_timeout_minutes=0.02), seed=1)
    assert time.monotonic() - started < 30


def test_a_world_without_an_address_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Failed, match="MASTER_PORT"):
        initialize_groups(ParallelConfig(), seed=1)
