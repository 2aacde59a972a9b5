"""A function over many items in several processes, the results in the order of the items.

Only a few items a worker are under way at a time, so that reading does not run ahead of writing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

from mindspeed_lora.errors import Failed

Item = TypeVar("Item")
Result = TypeVar("Result")

_UNDER_WAY = 3
"""Items a worker: one at work, one waiting, one on the way back."""

_function: Callable[[Any], Any] | None = None
"""Set in each worker when it starts, so that the tokenizer is not sent with every item."""


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``function`` of each item, in order; with one worker in this process.

    Raises:
        Failed: a worker died.
    """
    if workers == 1:
        yield from map(function, items)
        return
    methods = multiprocessing.get_all_start_methods()
    # A forked worker has the tokenizer at once; a spawned one has to import everything again.
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    executor = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(function,))
    under_way: deque[Future[Result]] = deque()
    try:
        for item in items:
            under_way.append(executor.submit(_call, item))
            if len(under_way) >= workers * _UNDER_WAY:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise Failed(
            f"one of the {workers} workers died, perhaps for want of memory; run again with fewer --workers"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    # An interrupt from the keyboard reaches every process; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Each worker is one process of many: threads of its own would only be in the others' way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _end_with_parent() -> None:
    """A worker waits for its next item for ever, even when nobody is left to send one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _call(item: Any) -> Any:
    assert _function is not None, "the worker was started by ordered_map"
    return _function(item)
