"""Programs of this project that start in milliseconds: forks of one process that has imported everything.

Importing torch and megatron-core takes seconds a process, which is most of what a tiny job takes. Run as a module, this
is that process: it reads requests, a line of JSON each, and answers with the numbers and the statuses of its children.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]


class Forked:
    """One running program; the part of ``subprocess.Popen`` that tests use."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], errors: Path) -> None:
        """Starts ``command``, an entry file and its words; its standard error goes to a file, its output nowhere."""
        self.returncode: int | None = None
        self.pid = _forker().start(self, command, environment, errors)

    def poll(self) -> int | None:
        """The status, of one killed by a signal its negative number; None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end. Raises ``subprocess.TimeoutExpired``."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            time.sleep(0.002)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal, if it still runs."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)


class _Forker:
    """The process that forks, and the thread that hears of its children."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
            text=True,
        )
        atexit.register(self._process.kill)
        self._started: queue.Queue[int] = queue.Queue()
        self._running: dict[int, Forked] = {}
        self._starting = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def start(
        self, child: Forked, command: Sequence[str], environment: Mapping[str, str], errors: Path
    ) -> int:
        """Forks; returns the child's number."""
        request = {"command": list(command), "environment": dict(environment), "errors": str(errors)}
        with self._starting:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            self._child = child
            return self._started.get(timeout=120.0)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            number, _, status = line.partition(" ")
            if status.strip() == "started":
                self._running[int(number)] = self._child
                self._started.put(int(number))
            else:
                self._running.pop(int(number)).returncode = int(status)


_the_forker: list[_Forker] = []


def _forker() -> _Forker:
    if not _the_forker:
        _the_forker.append(_Forker())
    return _the_forker[0]


def _serve() -> None:
    """Forks on request until nobody asks any more."""
    import tests.support.imported  # noqa: F401

    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    left = b""
    while True:
        ready, _, _ = select.select([requests, awake], [], [])
        if awake in ready:
            os.read(awake, 4096)
            _tell_ended()
        if requests in ready:
            read = os.read(requests.fileno(), 1 << 20)
            if not read:
                return
            *lines, left = (left + read).split(b"\n")
            for line in lines:
                request = json.loads(line)
                child = os.fork()
                if not child:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    _run(**request)
                print(f"{child} started", flush=True)


def _tell_ended() -> None:
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not child:
            return
        print(f"{child} {os.waitstatus_to_exitcode(status)}", flush=True)


def _run(command: Sequence[str], environment: Mapping[str, str], errors: str) -> NoReturn:
    """The child: runs the entry file as a program."""
    status: object = 0
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for number, file in ((0, nothing), (1, nothing), (2, os.open(errors, os.O_WRONLY | os.O_CREAT))):
            os.dup2(file, number)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    _serve()
