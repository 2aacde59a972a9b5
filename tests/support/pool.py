"""Processes that stay for the whole test session and form a new process group for every call.

Importing torch and megatron-core takes seconds a process, a training run of a tiny model not one. So the
processes are forks of one that has imported them, and are started once; the first ``n`` serve a world of n ranks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_GRACE_SECONDS = 5.0
"""What the other ranks get to end by themselves after one has failed."""
_DISTRIBUTED = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
)


class RankFailed(AssertionError):
    """A call failed or hung on a rank; the message holds the traceback or the stack of every such rank."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    stacks: Path
    """Where the process writes the stacks of its threads when a call takes too long."""


class WorkerPool:
    """Runs functions on n ranks at once; processes are started when first needed.

    They see no CUDA device, whatever the machine has, unless ``cuda``: the ranks of most tests are more than its
    devices.
    """

    def __init__(self, timeout: float = 240.0, cuda: bool = False) -> None:
        self._timeout = timeout
        """Seconds of a call that gives none of its own."""
        self.cuda = cuda
        self._context: SpawnContext | ForkServerContext
        if cuda:
            # A fork of a process that has looked for devices cannot use them.
            self._context = multiprocessing.get_context("spawn")
        else:
            self._context = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload(["tests.support.imported"])
        self._workers: list[_Worker] = []
        self._folder = tempfile.TemporaryDirectory(prefix="worker_stacks_")

    def run(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float | None = None
    ) -> list[Any]:
        """Results of ``function(*args)`` on every rank, in rank order.

        The function finds its rank and the address of its peers in the environment, as under torchrun. It must
        be importable by name.

        Raises:
            RankFailed: it raised on a rank, or did not end in time. All processes are then ended.
        """
        timeout = self._timeout if timeout is None else timeout
        while len(self._workers) < world_size:
            self._workers.append(self._start())
        store = _open_store()
        address = {
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        for rank, worker in enumerate(self._workers[:world_size]):
            environment = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            worker.connection.send((function, args, environment, timeout))
        return self._collect(world_size, timeout)

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()
        self._workers = []

    def _start(self) -> _Worker:
        here, there = self._context.Pipe()
        stacks = Path(self._folder.name, f"{len(self._workers)}_{time.monotonic_ns()}")
        process = self._context.Process(target=_serve, args=(there, str(stacks)), daemon=True)
        # Read by OpenMP when the child loads it; two cores are shared by up to four ranks.
        environment = {"OMP_NUM_THREADS": "1", **({} if self.cuda else {"CUDA_VISIBLE_DEVICES": ""})}
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            process.start()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        there.close()
        return _Worker(process, here, stacks)

    def _collect(self, world_size: int, timeout: float) -> list[Any]:
        waiting = {worker.connection: rank for rank, worker in enumerate(self._workers[:world_size])}
        results: list[Any] = [None] * world_size
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout + _GRACE_SECONDS
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    error, results[rank] = connection.recv()
                except EOFError:
                    error = "the process died"
                if error is not None:
                    failures[rank] = error
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        for rank in waiting.values():
            stacks = self._workers[rank].stacks
            told = stacks.read_text() if stacks.exists() else ""
            failures[rank] = f"still running when the call was given up\n{told}"
        if failures:
            self.close()
            raise RankFailed("\n".join(f"rank {rank}: {text}" for rank, text in failures.items()))
        return results


def _open_store() -> Any:
    """Where the ranks meet, as under torchrun: a rank that comes before its store waits for half a second."""
    from torch._C._distributed_c10d import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on.

    From below the range that systems give to outgoing connections: until a rank listens on it, seconds pass in
    which one of those could take it.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 16_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def _serve(connection: Connection, stacks: str) -> None:
    """Life of a worker: calls from the connection, until it is closed."""
    import torch

    torch.set_num_threads(1)
    with open(stacks, "w", encoding="utf-8") as stream:
        while True:
            try:
                function, args, environment, timeout = connection.recv()
            except (EOFError, KeyboardInterrupt):
                return
            os.environ.update(environment)
            faulthandler.dump_traceback_later(timeout, file=stream)
            error, result = None, None
            try:
                result = function(*args)
            except BaseException:
                error = traceback.format_exc()
            faulthandler.cancel_dump_traceback_later()
            for name in _DISTRIBUTED:
                os.environ.pop(name, None)
            connection.send((error, result))
            # Process groups end their threads when nothing refers to them; models and their hooks form cycles.
            function = args = result = None
            gc.collect()
