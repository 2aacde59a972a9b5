"""Ranks as a user starts them: real processes of an entry file, which can be killed.

They are forks of a process that has imported everything; ``fresh`` ones start from nothing, for their peak memory.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.support.forked import ROOT, Forked
from tests.support.pool import free_port


@dataclass(frozen=True)
class Ended:
    """What ranks left behind."""

    statuses: list[int]
    errors: list[str]
    """Standard error of each rank."""

    @property
    def sentences(self) -> list[str]:
        """Lines of all ranks that tell an error."""
        return [line for text in self.errors for line in text.splitlines() if line.startswith("error: ")]


class Ranks:
    """The processes of one job, killed at the latest when the context is left."""

    def __init__(self, program: str, world_size: int, words: Sequence[object], fresh: bool = False) -> None:
        self._errors = tempfile.TemporaryDirectory(prefix="ranks_")
        self.processes: list[subprocess.Popen[bytes] | Forked] = []
        command = [str(ROOT / program), *map(str, words)]
        address = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(world_size):
            environment = {
                **os.environ,
                **address,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1",
            }
            if not fresh:
                self.processes.append(Forked(command, environment, self._error_file(rank)))
                continue
            with self._error_file(rank).open("wb") as errors:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=errors,
                    )
                )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._errors.cleanup()

    def wait(self, timeout: float = 120.0) -> Ended:
        """Waits until every rank has ended by itself."""
        deadline = time.monotonic() + timeout
        for rank, process in enumerate(self.processes):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"rank {rank} still runs; it said: {self._said(rank)}") from None
        return self._ended()

    def kill(self, *ranks: int) -> Ended | None:
        """Kills the ranks, all without an argument, by SIGKILL."""
        for rank, process in enumerate(self.processes):
            if not ranks or rank in ranks:
                process.send_signal(signal.SIGKILL)
                process.wait()
        return None if ranks else self._ended()

    def wait_until(self, condition: Callable[[], bool], timeout: float = 120.0) -> None:
        """Watches closely until the condition holds; a rank that ends before is an error."""
        deadline = time.monotonic() + timeout
        while not condition():
            ended = [rank for rank, process in enumerate(self.processes) if process.poll() is not None]
            assert not ended, f"rank {ended[0]} has ended before; it said: {self._said(ended[0])}"
            assert time.monotonic() < deadline, f"not within {timeout} s; rank 0 said: {self._said(0)}"
            time.sleep(0.001)

    def _ended(self) -> Ended:
        statuses = [process.returncode for process in self.processes]
        return Ended(statuses, [self._said(rank) for rank in range(len(self.processes))])

    def _said(self, rank: int) -> str:
        return self._error_file(rank).read_text(encoding="utf-8", errors="replace")

    def _error_file(self, rank: int) -> Path:
        return Path(self._errors.name, f"{rank}")


def run_ranks(
    program: str, world_size: int, words: Sequence[object], timeout: float = 120.0, fresh: bool = False
) -> Ended:
    """Runs a job to its end."""
    with Ranks(program, world_size, words, fresh) as ranks:
        return ranks.wait(timeout)
