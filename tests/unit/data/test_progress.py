import io

import pytest

from mindspeed_lora.data.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_a_line_in_ten_seconds() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(log_interval=1, stream=stream, clock=clock)
    for second in range(1, 36):
        clock.now = 100.0 + second
        progress.update(rows=10, tokens=1000, fraction=second / 40)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "prepared 25%: 100 rows, 10,000 tokens (10 rows/s, 1,000 tokens/s), 0:30 left",
        "prepared 50%: 200 rows, 20,000 tokens (10 rows/s, 1,000 tokens/s), 0:20 left",
        "prepared 75%: 300 rows, 30,000 tokens (10 rows/s, 1,000 tokens/s), 0:10 left",
    ]
    assert "\r" not in stream.getvalue()


def test_off_a_terminal_a_line_in_log_interval_rows() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(log_interval=1000, stream=stream, clock=clock)
    for second in range(1, 40):
        clock.now = 100.0 + second
        progress.update(rows=40, tokens=1, fraction=0.1)
    assert len(stream.getvalue().splitlines()) == 1


def test_on_a_terminal_a_live_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    clock, stream = Clock(), Terminal()
    progress = Progress(log_interval=1000, stream=stream, clock=clock)
    for eighth in range(1, 11):
        clock.now = 100.0 + eighth / 8
        progress.update(rows=1, tokens=1, fraction=eighth / 20)
    shown = stream.getvalue()
    assert shown.count("\r") == 5
    assert "\n" not in shown
    assert shown.split("\r")[-1].startswith("[############............]  50% 10 rows")
    progress.close()
    assert stream.getvalue().endswith("\r")


def test_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    clock, stream = Clock(), Terminal()
    progress = Progress(log_interval=1000, stream=stream, clock=clock)
    clock.now += 1
    progress.update(rows=1, tokens=1, fraction=0.5)
    assert len(stream.getvalue()) == 1 + 39


def test_hours() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(log_interval=1, stream=stream, clock=clock)
    clock.now += 100
    progress.update(rows=10, tokens=1, fraction=0.01)
    assert stream.getvalue().rstrip().endswith("2:45:00 left")
