"""Layers of several ranks at one rate of their link after the other, each way of theirs by turns with the others."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from comparison.local_copies import local_copies
from comparison.peak import peak_above
from comparison.rate_limited_link import bring_up, limit


class Layers(Protocol):
    """What is measured, on this rank."""

    @property
    def bytes_sent(self) -> int:
        """By one rank in :meth:`communicate`."""
        ...

    def step(self) -> None:
        """One step of training."""
        ...

    def communicate(self) -> None:
        """What a step sends that can be hidden, alone."""
        ...


class LinkSweep:
    """Measures; all ranks call the same."""

    def __init__(self, layers: Layers, is_main: bool, repeats: int) -> None:
        self.layers, self.is_main, self.repeats = layers, is_main, repeats
        self._limit(None)
        self.use_plainest()
        self.compute = self._compute()

    def use_plainest(self) -> None:
        """Lets the layers run as they do without anything that hides communication."""
        raise NotImplementedError

    def in_turn(self, ways: Sequence[str], use: Callable[[str], None]) -> dict[str, Any]:
        """Seconds of a step each way, and of the compute alone, after one turn that is not counted; and memory."""
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        compute = []
        for turn in range(self.repeats + 1):
            for name in ways:
                use(name)
                took = self.time(self.layers.step)
                if turn:
                    seconds[name].append(took)
            self.use_plainest()
            compute.append(self._compute_once())
        peaks = {}
        for name in ways:
            use(name)
            peaks[name] = peak_above(self.layers.step)
        return {
            "compute_seconds": statistics.median(compute),
            "step_seconds": seconds,
            "peak_bytes": peaks,
        }

    def limit_to(self, ratio: float | None) -> float | None:
        """Limits the link such that communication takes ``ratio`` times the compute; its rate, bytes a second."""
        rate = None
        if ratio is not None:
            # Both ranks' bytes pass the same loopback.
            rate = 2 * self.layers.bytes_sent / (ratio * self.compute)
        self._limit(rate)
        return rate

    def median(self, work: Callable[[], None]) -> float:
        """Seconds of the work, done before once."""
        work()
        return statistics.median(self.time(work) for _ in range(self.repeats))

    def time(self, work: Callable[[], None]) -> float:
        """Seconds until all ranks have done the work."""
        dist.barrier()
        started = time.perf_counter()
        work()
        dist.barrier()
        return time.perf_counter() - started

    def _compute(self) -> float:
        self._compute_once()
        return statistics.median(self._compute_once() for _ in range(max(3, self.repeats)))

    def _compute_once(self) -> float:
        with local_copies():
            started = time.perf_counter()
            self.layers.step()
            took = time.perf_counter() - started
        slowest = torch.tensor([took])
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return float(slowest)

    def _limit(self, rate: float | None) -> None:
        if self.is_main:
            limit(rate)
        dist.barrier()


def start_ranks(count: int) -> int:
    """Starts this script anew as so many ranks of one thread, and waits for them; the largest exit status."""
    bring_up()
    environment = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    environment["OMP_NUM_THREADS"] = "1"
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, **environment, "RANK": str(rank)})
        for rank in range(count)
    ]
    return max(process.wait() for process in ranks)
