from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mindspeed_lora.training.signals import LEFT_EARLY, StopReason, StopRequest


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_wish_and_no_end(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.requested()
        send(number)
        assert stop.requested() is StopReason[number.name]
        assert stop.requested().describe() == f"{number.name} received"


def test_the_more_urgent_reason_wins() -> None:
    with StopRequest(exit_duration_in_mins=1.0, started=0.0) as stop:
        assert stop.requested(now=60.0) is StopReason.TIME_LIMIT
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        assert stop.requested(now=60.0) is StopReason.SIGTERM


def test_the_largest_number_over_the_ranks_is_the_reason_of_all() -> None:
    assert max(StopReason.NONE, StopReason.TIME_LIMIT, StopReason.SIGUSR1) is StopReason.SIGUSR1
    assert StopReason(int(float(StopReason.SIGTERM))) is StopReason.SIGTERM
    assert not StopReason.NONE


def test_time_limit_counts_from_the_given_moment() -> None:
    with StopRequest(exit_duration_in_mins=0.5, started=1000.0) as stop:
        assert stop.requested(now=1029.9) is StopReason.NONE
        assert stop.requested(now=1030.0) is StopReason.TIME_LIMIT
    assert StopReason.TIME_LIMIT.describe() == "--exit-duration-in-mins is over"


def test_time_limit_counts_from_the_creation_by_itself() -> None:
    with StopRequest(exit_duration_in_mins=0.05 / 60) as stop:
        assert not stop.requested()
        time.sleep(0.06)
        assert stop.requested() is StopReason.TIME_LIMIT


def test_no_limit_is_never_over() -> None:
    with StopRequest(started=0.0) as stop:
        assert not stop.requested(now=1e12)


def test_the_handlers_before_come_back() -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
    try:
        stop = StopRequest()
        send(signal.SIGUSR1)
        assert caught == []
        stop.close()
        stop.close()
        send(signal.SIGUSR1)
        assert caught == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


SAVING = """
import sys, time
from pathlib import Path
from mindspeed_lora.training.signals import LEFT_EARLY, StopRequest
with StopRequest() as stop:
    print("training", flush=True)
    while not stop.requested():
        time.sleep(0.01)
    print("saving", flush=True)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        time.sleep(0.1)
    Path(sys.argv[1]).write_text("whole")
sys.exit(LEFT_EARLY)
"""


def test_a_second_signal_does_not_harm_the_save(tmp_path: Path) -> None:
    job = subprocess.Popen(
        [sys.executable, "-c", SAVING, str(tmp_path / "saved")], stdout=subprocess.PIPE, text=True
    )
    assert job.stdout is not None
    assert job.stdout.readline() == "training\n"
    job.send_signal(signal.SIGUSR1)
    assert job.stdout.readline() == "saving\n"
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        job.send_signal(number)
        time.sleep(0.05)
    assert job.wait(30) == LEFT_EARLY == 75
    assert (tmp_path / "saved").read_text() == "whole"


def test_a_forked_worker_still_ends_when_it_is_told_to() -> None:
    with StopRequest() as stop:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
        assert not stop.requested()
