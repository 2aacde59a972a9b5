"""The groups of several ranks: who is where, and who talks with whom."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups
from tests.support.pool import WorkerPool


def describe(
    tp: int, pp: int, timeout: float, cp: int = 1, algo: str = "megatron", ulysses: int | None = None
) -> dict[str, object]:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        distributed_timeout_minutes=timeout,
        context_parallel_size=cp,
        context_parallel_algo=f"{algo}_cp_algo",
        ulysses_degree_in_cp=ulysses,
    )
    groups, _ = initialize_groups(parallel, seed=1)
    named = {
        "tp": groups.tp_group,
        "pp": groups.pp_group,
        "dp": groups.dp_group,
        "dp_cp": groups.dp_cp_group,
        "ulysses": groups.context.ulysses_group,
        "ring": groups.context.ring_group,
        "model": groups.model_group,
        "control": groups.control_group,
        "embedding": groups.embedding_group,
    }
    found: dict[str, object] = {
        name: dist.get_process_group_ranks(group) if group is not None else None
        for name, group in named.items()
    }
    for group in named.values():
        if group is not None and dist.get_rank(group) >= 0:
            dist.all_reduce(torch.ones(1), group=group)
    found["ranks"] = groups.tp_rank, groups.pp_rank, groups.dp_rank
    found["copy"] = groups.dp_cp_rank, groups.dp_cp_size
    found["place"] = groups.context.ulysses_rank, groups.context.ring_rank
    found["stage"] = groups.is_first_stage, groups.is_last_stage
    found["main"] = groups.is_main
    found["draw"] = torch.rand(1).item()
    destroy_groups()
    return found


@pytest.mark.parametrize("timeout", [10.0, 0.5])
def test_four_ranks_as_two_by_two(workers: WorkerPool, timeout: float) -> None:
    found = workers.run(4, describe, 2, 2, timeout)
    assert [rank["ranks"] for rank in found] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert [rank["tp"] for rank in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["pp"] for rank in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["embedding"] for rank in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["model"] for rank in found] == [[0, 1, 2, 3]] * 4
    assert [rank["stage"] for rank in found] == [(True, False)] * 2 + [(False, True)] * 2
    assert [rank["main"] for rank in found] == [True, False, False, False]


def test_what_tp_leaves_is_data_parallel(workers: WorkerPool) -> None:
    found = workers.run(4, describe, 2, 1, 10.0)
    assert [rank["ranks"] for rank in found] == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]
    assert [rank["dp"] for rank in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["model"] for rank in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["stage"] for rank in found] == [(True, True)] * 4


def test_middle_stages_hold_no_embedding(workers: WorkerPool) -> None:
    found = workers.run(4, describe, 1, 4, 10.0)
    assert [rank["stage"] for rank in found] == [(True, False), (False, False), (False, False), (False, True)]
    assert found[0]["embedding"] == found[3]["embedding"] == [0, 3]


def test_the_default_random_stream_is_the_same_on_every_rank(workers: WorkerPool) -> None:
    """Dropout on what TP ranks hold alike must drop the same elements."""
    assert len({rank["draw"] for rank in workers.run(2, describe, 2, 1, 10.0)}) == 1


def test_context_parallel_ranks_compute_the_same_rows(workers: WorkerPool) -> None:
    found = workers.run(4, describe, 1, 1, 10.0, 2)
    assert [rank["ranks"] for rank in found] == [(0, 0, 0), (0, 0, 0), (0, 0, 1), (0, 0, 1)]
    assert [rank["copy"] for rank in found] == [(rank, 4) for rank in range(4)]
    assert [rank["dp"] for rank in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["dp_cp"] for rank in found] == [[0, 1, 2, 3]] * 4
    assert [rank["ring"] for rank in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["ulysses"] for rank in found] == [None] * 4


def test_ulysses_alone_has_no_ring(workers: WorkerPool) -> None:
    found = workers.run(4, describe, 2, 1, 10.0, 2, "ulysses")
    assert [rank["ulysses"] for rank in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [(rank["place"], rank["ring"]) for rank in found] == [((n // 2, 0), None) for n in range(4)]


def test_hybrid_is_a_ring_of_neighbours(workers: WorkerPool) -> None:
    found = workers.run(4, describe, 1, 1, 10.0, 4, "hybrid", 2)
    assert [rank["ulysses"] for rank in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["ring"] for rank in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["place"] for rank in found] == [(0, 0), (1, 0), (0, 1), (1, 1)]
