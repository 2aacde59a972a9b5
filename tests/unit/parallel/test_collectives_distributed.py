"""Collectives between ranks, and one voice where a rank fails."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.errors import Refused
from mindspeed_lora.parallel import collectives
from mindspeed_lora.parallel.groups import ParallelGroups, destroy_groups, initialize_groups
from tests.support.pool import WorkerPool


def _join(tp: int = 1, pp: int = 1) -> ParallelGroups:
    return initialize_groups(
        ParallelConfig(
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, distributed_timeout_minutes=3
        ),
        seed=1,
    )[0]


def exchange() -> dict[str, object]:
    groups = _join(tp=2)
    rank = groups.rank
    found: dict[str, object] = {
        "sum": collectives.all_reduce_sum(torch.tensor([1.0, rank]), groups.tp_group).tolist(),
        "max": collectives.all_reduce_max(torch.tensor([-rank, rank]), groups.dp_group).tolist(),
        "broadcast": collectives.broadcast(torch.tensor([rank]), groups.tp_group, source=1).item(),
        "gathered": collectives.gather_objects({"rank": rank}, groups),
        "all": collectives.all_gather_objects(rank * 10, groups),
        "object": collectives.broadcast_object(f"rank {rank}", groups),
    }
    if groups.dp_rank == 0:
        strided = torch.arange(6.0).view(2, 3).t()
        collectives.send(strided + rank, groups.dp_group, destination=1)
    else:
        found["received"] = collectives.receive(torch.empty(3, 2), groups.dp_group, source=0).tolist()
    collectives.barrier(groups)
    destroy_groups()
    return found


def test_values_cross_the_right_group(workers: WorkerPool) -> None:
    found = workers.run(4, exchange)
    assert [rank["sum"] for rank in found] == [[2.0, 1.0], [2.0, 1.0], [2.0, 5.0], [2.0, 5.0]]
    assert [rank["max"] for rank in found] == [[0, 2], [-1, 3], [0, 2], [-1, 3]]
    assert [rank["broadcast"] for rank in found] == [1, 1, 3, 3]
    assert [rank["gathered"] for rank in found] == [[{"rank": i} for i in range(4)], None, None, None]
    assert [rank["all"] for rank in found] == [[0, 10, 20, 30]] * 4
    assert [rank["object"] for rank in found] == ["rank 0"] * 4
    assert found[2]["received"] == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert found[3]["received"] == [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]


class Boom(Exception):
    """An error that is not the user's."""


def fail_on(failing: Sequence[int], kind: type[Exception]) -> tuple[str, str, list[int]]:
    """Type and text of the error that this rank raises, and what a collective after it gives."""
    groups = _join()

    def work() -> int:
        if groups.rank in failing:
            raise kind(f"broken on {groups.rank}")
        return groups.rank

    try:
        outcome = "none", str(collectives.together(groups, work))
    except Exception as error:
        outcome = type(error).__name__, str(error)
    after = collectives.all_gather_objects(groups.rank, groups)
    destroy_groups()
    return *outcome, after


def test_work_that_goes_well_gives_each_rank_its_own(workers: WorkerPool) -> None:
    assert [text for _, text, _ in workers.run(3, fail_on, [], Boom)] == ["0", "1", "2"]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_the_failing_rank_speaks_and_the_others_leave_silently(workers: WorkerPool, failing: int) -> None:
    found = workers.run(3, fail_on, [failing], Boom)
    for rank, (kind, text, after) in enumerate(found):
        assert (kind, text) == (
            ("Boom", f"broken on {failing}") if rank == failing else ("PeerFailure", f"rank {failing} failed")
        )
        assert after == [0, 1, 2], "the ranks are still in step"


def test_of_several_the_lowest_speaks(workers: WorkerPool) -> None:
    found = workers.run(3, fail_on, [2, 1], Boom)
    assert [kind for kind, _, _ in found] == ["PeerFailure", "Boom", "PeerFailure"]
    assert found[2][1] == "rank 1 failed"


def test_a_refusal_is_heard_from_any_rank(workers: WorkerPool) -> None:
    """Only rank 0 prints a refusal, so one that comes up later elsewhere must become a failure."""
    found = workers.run(2, fail_on, [1], Refused)
    assert [kind for kind, _, _ in found] == ["PeerFailure", "Failed"]
    assert found[1][1] == "broken on 1"


def pass_around() -> dict[str, object]:
    groups = _join()
    group, rank = groups.dp_group, groups.rank
    strided = (10 * rank + torch.arange(6)).view(2, 3).t()
    first = collectives.RingPass(torch.tensor([rank]), group)
    second = collectives.RingPass(torch.tensor([rank, -rank]), group, tag=1)
    found = {
        "all to all": collectives.all_to_all(strided, group).tolist(),
        "second": second.wait().tolist(),
        "first": first.wait().tolist(),
    }
    destroy_groups()
    return found


def test_all_to_all_and_two_passes_around_a_ring_at_once(workers: WorkerPool) -> None:
    for rank, found in enumerate(workers.run(3, pass_around)):
        assert found["all to all"] == [[10 * source + rank, 10 * source + rank + 3] for source in range(3)]
        before = (rank - 1) % 3
        assert (found["first"], found["second"]) == ([before], [before, -before])
