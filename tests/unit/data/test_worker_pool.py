import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mindspeed_lora.data.worker_pool import ordered_map
from mindspeed_lora.errors import Failed, Refused


def slow_first(item: int) -> tuple[int, int]:
    time.sleep(0.05 if item % 4 == 0 else 0)
    return item, os.getpid()


def refuse_three(item: int) -> int:
    if item == 3:
        raise Refused("row 3: no")
    return item


def die_at_three(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), 9)
    return item


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_keep_the_order(workers: int) -> None:
    results = list(ordered_map(slow_first, range(20), workers))
    assert [item for item, _ in results] == list(range(20))
    processes = {process for _, process in results}
    assert (os.getpid() in processes) == (workers == 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_through(workers: int) -> None:
    results = ordered_map(refuse_three, range(100), workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(Refused, match="row 3: no"):
        next(results)


def test_a_dead_worker_is_no_hang() -> None:
    with pytest.raises(Failed, match="one of the 2 workers died"):
        list(ordered_map(die_at_three, range(100), 2))


def test_reading_does_not_run_ahead() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(1000):
            taken += 1
            yield item

    results = ordered_map(slow_first, items(), 2)
    next(results)
    assert taken <= 7
    results.close()  # type: ignore[attr-defined]


def test_an_error_while_reading_comes_through() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise Refused("line 2: broken")

    with pytest.raises(Refused, match="line 2: broken"):
        list(ordered_map(slow_first, items(), 2))


ROOT = Path(__file__).parents[3]
SLEEPERS = """
import os, signal, sys, time
# A shell without job control starts background jobs with interrupts ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
from mindspeed_lora.data.worker_pool import ordered_map

def sleep(seconds):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(seconds)

list(ordered_map(sleep, [0.1] * 1000, 2))
"""


def start_sleepers() -> tuple[subprocess.Popen[str], set[int]]:
    """A process with two workers of its own process group, and the ids of the workers."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPERS],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    workers: set[int] = set()
    while len(workers) < 2:
        workers.add(int(process.stdout.readline()))
    return process, workers


def wait_until_gone(processes: set[int]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not any(is_running(process) for process in processes):
            return
        time.sleep(0.05)
    raise AssertionError(f"still there: {processes}")


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")
def test_workers_do_not_outlive_a_killed_parent() -> None:
    process, workers = start_sleepers()
    process.kill()
    process.wait()
    wait_until_gone(workers)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")
def test_an_interrupt_is_answered_by_the_parent_alone() -> None:
    process, workers = start_sleepers()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    wait_until_gone(workers)
    assert errors.count("KeyboardInterrupt") == 1
    assert "Process " not in errors
