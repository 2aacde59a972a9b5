"""Kills conversions at random moments, in a process that does nothing else; run as a module by the kill test.

Each conversion is a fork of this process, which has everything imported: it starts in milliseconds, and inherits
nothing from other tests.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from mindspeed_lora.checkpoint.conversion.convert import convert
from mindspeed_lora.config.commands import parse


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start(words: list[str]) -> int:
    """Convert in a process of its own; returns its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        convert(parse("convert", words))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def finish(words: list[str]) -> float:
    """Convert to the end; returns the seconds that it took."""
    began = time.monotonic()
    assert os.waitpid(start(words), 0)[1] == 0
    return time.monotonic() - began


def kill_conversions(old_words: list[str], new_words: list[str], target: Path, kills: int) -> dict[str, int]:
    """Convert as ``old_words`` say, then kill what ``new_words`` start: how often was which of the two found?"""
    finish(old_words)
    old = snapshot(target)
    span = 1.3 * finish(new_words)
    expected = snapshot(target)
    assert expected != old
    rng, outcomes = random.Random(0), {"old": 0, "new": 0}
    for _ in range(kills):
        if snapshot(target) != old:
            finish([*old_words, "--overwrite"])
            old = snapshot(target)
        child = start(new_words)
        time.sleep(rng.uniform(0, span))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = snapshot(target)
        assert found in (old, expected)
        is_new = found == expected
        outcomes["new" if is_new else "old"] += 1
        # How long a conversion takes changes with what else the machine does.
        span *= 0.85 if is_new else 1.15
    finish(new_words)
    assert snapshot(target) == expected
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    return outcomes


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    found = kill_conversions(job["old"], job["new"], Path(job["target"]), job["kills"])
    print(json.dumps(found))
