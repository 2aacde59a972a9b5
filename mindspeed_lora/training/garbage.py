"""``--manual-gc``: when Python collects its garbage.

A collection that comes by itself stops one rank at a moment of its own, and all others wait for it at their next
exchange. Collected after the same steps by every rank, it costs its time once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mindspeed_lora.config.training import TrainingConfig


@contextmanager
def garbage_collection(training: TrainingConfig) -> Iterator[Callable[[int], None]]:
    """Gives what is to be called after each step; without ``--manual-gc`` it does nothing."""
    if not training.manual_gc:
        yield lambda step: None
        return
    interval, before = training.manual_gc_interval, gc.isenabled()

    def collect(step: int) -> None:
        if interval and step % interval == 0:
            gc.collect()

    gc.disable()
    gc.collect()
    try:
        yield collect
    finally:
        if before:
            gc.enable()
