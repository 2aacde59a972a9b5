from __future__ import annotations

import threading

import pytest

from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.parallel.heartbeat import Beat, Heartbeat, bounded, hang_sentence, summarise
from mindspeed_lora.parallel.whereabouts import our_line, ranks_text, waits_in


def test_names_of_ranks() -> None:
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([7, 0, 1, 2]) == "ranks 0-2, 7"


def test_the_silent_rank_comes_first() -> None:
    waiting = "all_reduce over ranks 0-3"
    beats = {rank: Beat(9, 4, "optimizer", waiting, "training/loop.py:1 f") for rank in range(3)}
    beats[3] = Beat(5, 4, "forward and backward passes", "", "training/step.py:88 _run")
    text = summarise(beats, {3})
    assert text.startswith("rank 3: no more signs of life")
    assert "since step 4, forward and backward passes, at training/step.py:88 _run" in text
    assert "; ranks 0-2: waiting in all_reduce over ranks 0-3 (step 4, optimizer)" in text
    alive = summarise(beats, set())
    assert alive.startswith("rank 3: in no collective: step 4")
    sentence = hang_sentence(alive, 6.0)
    assert sentence.startswith("no progress within --distributed-timeout-minutes 0.1: rank 3")
    assert "\n" not in sentence and "--resume auto" in sentence


def test_bounded() -> None:
    assert bounded(lambda: 3) == 3
    with pytest.raises(ValueError, match="mine"):
        bounded(lambda: _raise(ValueError("mine")))
    release = threading.Event()
    with pytest.raises(TimeoutError):
        bounded(lambda: release.wait(30), 0.05)
    release.set()


def _raise(error: Exception) -> None:
    raise error


def test_one_process_has_no_beats(groups: ParallelGroups) -> None:
    with Heartbeat(groups) as heartbeat:
        heartbeat.mark("saving", 3)
        assert (heartbeat.phase, heartbeat.step, heartbeat.summary()) == ("saving", 3, "")
    assert threading.active_count() == 1 or "heartbeat" not in {
        thread.name for thread in threading.enumerate()
    }


def test_where_this_process_is() -> None:
    """Seen by another thread, nothing of the package is on this stack, and no collective."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.extend([waits_in(), our_line()]))
    thread.start()
    thread.join()
    assert found == ["", ""]


def test_a_thread_on_an_instruction_of_no_line() -> None:
    """Python says None in place of the line of such a frame."""

    def stands(reached: threading.Event, lock: threading.Lock) -> None:
        reached.set()
        lock.acquire()

    stands.__code__ = stands.__code__.replace(co_linetable=b"")
    reached, lock = threading.Event(), threading.Lock()
    lock.acquire()
    thread = threading.Thread(target=stands, args=(reached, lock))
    thread.start()
    reached.wait(30)
    try:
        assert waits_in() == ""
    finally:
        lock.release()
        thread.join()
