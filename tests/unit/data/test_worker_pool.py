import os
import time
from collections.abc import Iterator

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
