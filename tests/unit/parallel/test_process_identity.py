"""Whether a process still runs, as its peers see it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mindspeed_lora.parallel.process_identity import has_ended, this_process

TELLS = "from mindspeed_lora.parallel.process_identity import this_process; print(this_process()); input()"


def test_a_process_ends() -> None:
    assert has_ended(this_process()) is False
    with subprocess.Popen(
        [sys.executable, "-c", TELLS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        told = other.stdout.readline().strip()
        assert has_ended(told) is False
        other.kill()
        assert other.wait() != 0
    assert has_ended(told) is True
    node, number, started = this_process().rsplit(" ", 2)
    assert has_ended(f"{node} {number} {int(started) - 1}") is True, "another process of the same number"


@pytest.mark.parametrize("node", ["elsewhere/pid:[1]", ""])
def test_of_another_node_it_cannot_be_seen(node: str) -> None:
    assert has_ended(f"{node} 1 1") is None
