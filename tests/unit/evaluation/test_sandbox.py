"""What a program written by a model can do, and what it cannot."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mindspeed_lora.evaluation.sandbox import run_program

QUEUE = {"x86_64": 129, "aarch64": 138}.get(platform.machine(), -1)
"""Number of the system call rt_sigqueueinfo."""
GOOD = """
import collections, fcntl, functools, itertools, math, re, typing, heapq, string, json, random, datetime, hashlib

def add(a, b):
    print("adding")
    return a + b

assert fcntl.fcntl(1, fcntl.F_GETFL) >= 0
assert add(2, 3) == 5 and math.isclose(math.sqrt(2) ** 2, 2)
"""
HOSTILE = {
    "wrong": "assert 1 == 2",
    "no syntax": "def broken(:",
    "leaves early": "import os; os._exit(0)",
    "leaves politely": "raise SystemExit(0)",
    "forks": "import os\nos.fork()",
    "threads": "import threading\nthreading.Thread(target=print).start()",
    "starts a program": "import subprocess\nsubprocess.run(['/bin/true'], check=True)",
    "replaces itself": "import os\nos.execv('/bin/true', ['true'])",
    "opens a socket": "import socket\nsocket.socket()",
    "asks the network": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1')",
    "much memory": "x = bytearray(1 << 40)",
    "writes here": "open('file', 'w').write('x')",
    "sends a signal": "import os\nos.kill(os.getppid(), 0)",
    "queues a signal": f"import ctypes, os\nlibc, me = ctypes.CDLL(None), os.getpid()\n"
    f"information = (ctypes.c_int * 32)(0, 0, -1)\nassert libc.syscall({QUEUE}, me, 0, information) == 0",
    "lets a pipe send a signal": "import fcntl, os\nfcntl.fcntl(1, fcntl.F_SETOWN, os.getpid())",
    "slows others down": "import os\nos.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0))",
    "crowds others": "import os\nos.sched_setaffinity(0, os.sched_getaffinity(0))",
    # Apart from that of reading files, where no other user can read the interpreter's.
    "keeps a right of root": "status = open('/proc/self/status').read()\n"
    "assert int(status.partition('CapEff:')[2].split()[0], 16) & ~4",
    "mounts": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
}


def test_a_program_that_does_what_it_should_passes() -> None:
    assert run_program(GOOD, 10.0).passed


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_what_is_not_allowed_fails(program: str) -> None:
    started = time.monotonic()
    outcome = run_program(program, 10.0)
    assert (outcome.passed, outcome.reason) == (False, "failed")
    assert time.monotonic() - started < 8.0


@pytest.mark.parametrize(
    "program",
    ["while True: pass", "import time\ntime.sleep(60)", "import os\nwhile True: os.write(1, b'x' * 4096)"],
    ids=["computes", "sleeps", "talks"],
)
def test_what_does_not_end_is_ended(program: str) -> None:
    started = time.monotonic()
    assert not run_program(program, 1.0).passed
    assert time.monotonic() - started < 8.0


def test_a_fork_bomb_leaves_nothing(tmp_path: Path) -> None:
    """Each copy would sleep with a mark in its command line."""
    mark = f"bomb-{os.getpid()}-{time.time_ns()}"
    bomb = f"""
import ctypes, os, sys, time
name = {mark!r}.encode()
started = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            ctypes.CDLL(None).prctl(15, name, 0, 0, 0)
            time.sleep(30)
        started += 1
    except OSError:
        pass
assert started > 0
"""
    assert not run_program(bomb, 5.0).passed
    names = [path.read_text() for path in Path("/proc").glob("[0-9]*/comm") if path.exists()]
    assert not any(name.startswith("bomb-") for name in names)


@pytest.mark.parametrize("way", ["open", "os.open", "pathlib", "rename", "remove", "link", "mkdir", "chmod"])
def test_files_outside_stay_as_they_are(tmp_path: Path, way: str) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "there").write_text("as it was")
    (tmp_path / "there").chmod(0o666)
    ways = {
        "open": "open(f'{folder}/there', 'a').write('x')",
        "os.open": "import os; os.write(os.open(f'{folder}/new', os.O_CREAT | os.O_WRONLY), b'x')",
        "pathlib": "import pathlib; pathlib.Path(folder, 'new').write_text('x')",
        "rename": "import os; os.rename(f'{folder}/there', f'{folder}/new')",
        "remove": "import os; os.remove(f'{folder}/there')",
        "link": "import os; os.symlink('/', f'{folder}/new')",
        "mkdir": "import os; os.mkdir(f'{folder}/new')",
        "chmod": "import os; os.chmod(f'{folder}/there', 0)",
    }
    before = (tmp_path / "there").stat().st_mode
    assert not run_program(f"folder = {str(tmp_path)!r}\n{ways[way]}", 10.0).passed
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "as it was" and (tmp_path / "there").stat().st_mode == before


def test_the_same_for_a_user_without_rights(tmp_path: Path) -> None:
    """Where the tests run as root: the sandbox as another user starts it."""
    if os.geteuid() != 0:
        pytest.skip("is a user without rights already")
    code = (
        "import os, sys; os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[3])!r})\n"
        "from mindspeed_lora.evaluation.sandbox import run_program\n"
        f"print(run_program({GOOD!r}, 10.0).passed, run_program('import os; os.fork()', 10.0).passed,"
        " run_program('import socket; socket.socket()', 10.0).passed)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    if "Permission denied" in done.stderr or "No module named" in done.stderr:
        pytest.skip("another user cannot read the sources")
    assert done.stdout.split() == ["True", "False", "False"], done.stderr
