"""One sentence for a job that a rank takes down."""

from __future__ import annotations

import time

import pytest

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.errors import Failed, PeerFailure
from mindspeed_lora.parallel.collectives import barrier
from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups
from mindspeed_lora.parallel.joining import joined_groups
from mindspeed_lora.parallel.voice import speak_or_leave
from tests.support.pool import WorkerPool


def end(first: int, kind: str) -> tuple[str, str]:
    """How this rank ends where rank ``first`` fails by itself and the others feel it."""
    groups, _ = initialize_groups(ParallelConfig(distributed_timeout_minutes=3), seed=1)
    own: Exception = {
        "user": Failed("iteration 3: the loss is nan"),
        "bug": ZeroDivisionError("division by zero"),
        "lost": RuntimeError("[gloo/pair.cc:534] Connection closed\nby peer [127.0.0.1]:1"),
    }[kind]
    error = own if groups.rank == first else RuntimeError("[gloo] Connection reset by peer")
    barrier(groups)
    if groups.rank != first:
        time.sleep(0.3)
    found = speak_or_leave(error, groups)
    barrier(groups)
    destroy_groups()
    return type(found).__name__, str(found)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("user", ("Failed", "iteration 3: the loss is nan")),
        ("bug", ("ZeroDivisionError", "division by zero")),
    ],
)
def test_the_rank_that_failed_first_speaks(
    workers: WorkerPool, first: int, kind: str, expected: tuple[str, str]
) -> None:
    found = workers.run(3, end, first, kind)
    assert found[first] == expected
    assert [kind for rank, (kind, _) in enumerate(found) if rank != first] == ["PeerFailure"] * 2


def ends_of_a_program(kinds: tuple[str, ...]) -> list[tuple[str, str]]:
    """How each piece of work of a program that goes on after a failure ends; rank 1 fails first."""
    found = []
    for kind in kinds:
        try:
            with joined_groups(ParallelConfig(distributed_timeout_minutes=3), 1) as (groups, _, _):
                if groups.rank != 1:
                    time.sleep(0.3)
                raise Failed(kind)
        except (Failed, PeerFailure) as error:
            found.append((type(error).__name__, str(error)))
    destroy_groups()
    return found


def test_a_program_is_told_of_every_failure(workers: WorkerPool) -> None:
    other, own = workers.run(2, ends_of_a_program, ("the first", "the second"))
    assert own == [("Failed", "the first"), ("Failed", "the second")]
    assert [kind for kind, _ in other] == ["PeerFailure"] * 2


def test_a_lost_peer_is_one_sentence(workers: WorkerPool) -> None:
    """Where the rank that died says nothing, the first of those that feel it does."""
    kind, text = workers.run(2, end, 1, "lost")[1]
    assert kind == "Failed"
    assert "lost contact" in text and "Connection closed by peer" in text and "--resume auto" in text
    assert "\n" not in text


def without_store() -> str:
    """The end of a rank whose job's store went down."""
    groups, _notices = initialize_groups(ParallelConfig(), seed=1)
    barrier(groups)
    destroy_groups()
    found = speak_or_leave(RuntimeError("Connection reset by peer"), groups)
    return type(found).__name__


def test_without_the_store_rank_1_speaks(workers: WorkerPool) -> None:
    """The store lives in rank 0: that it is gone means that rank 0 is."""
    assert workers.run(3, without_store)[1:] == [Failed.__name__, PeerFailure.__name__]
