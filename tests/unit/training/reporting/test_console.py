from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from mindspeed_lora.training.reporting.console import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(written: str) -> list[str]:
    """What a terminal shows after these characters, for the two controls that the console uses."""
    rows = [""]
    column = 0
    for part in written.replace("\x1b[K", "\x00"):
        if part == "\n":
            rows.append("")
            column = 0
        elif part == "\r":
            column = 0
        elif part == "\x00":
            rows[-1] = rows[-1][:column]
        else:
            rows[-1] = rows[-1][:column] + part + rows[-1][column + 1 :]
            column += 1
    return rows


def test_the_live_line_stays_below_the_lines() -> None:
    output = Terminal()
    console = Console(output=output, errors=output)
    console.line("first")
    console.live("half way, a long line")
    console.line("second")
    assert screen(output.getvalue()) == ["first", "second", "half way, a long line"]
    console.notice("look")
    assert screen(output.getvalue()) == ["first", "second", "notice: look", "half way, a long line"]
    console.live("done")
    assert screen(output.getvalue())[-1] == "done"
    console.close()
    console.line("last")
    assert screen(output.getvalue())[-3:] == ["done", "last", ""]


def test_off_a_terminal_there_is_no_live_line_and_no_control() -> None:
    output, errors = io.StringIO(), io.StringIO()
    console = Console(output=output, errors=errors)
    console.live("half way")
    console.line("first")
    console.notice("look")
    console.close()
    assert output.getvalue() == "first\n"
    assert errors.getvalue() == "notice: look\n"


def test_the_live_line_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    output = Terminal()
    Console(output=output).live("x" * 100)
    assert screen(output.getvalue()) == ["x" * 19]


def test_an_encoding_without_the_characters_gets_escapes() -> None:
    raw = io.BytesIO()
    output = io.TextIOWrapper(raw, encoding="ascii")
    Console(is_terminal=False, output=output).line("/data/模型")
    assert raw.getvalue() == b"/data/\\u6a21\\u578b\n"


def test_a_closed_stream_is_no_error() -> None:
    output = io.StringIO()
    output.close()
    Console(output=output, errors=output).line("nobody")


WRITER = """
import sys
from mindspeed_lora.training.reporting.console import Console
console = Console()
for number in range(20000):
    console.line(f"line {number}")
sys.exit(75)
"""


# Without a buffer nothing is left over that fails once more when the interpreter ends.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def test_a_reader_that_goes_away_does_not_stop_the_run() -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=BUFFERED,
    )
    assert writer.stdout is not None and writer.stderr is not None
    assert writer.stdout.readline() == "line 0\n"
    writer.stdout.close()
    complaints = writer.stderr.read()
    assert writer.wait(60) == 75
    assert complaints == ""


def test_a_full_disk_behind_standard_output_does_not_stop_the_run() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", WRITER], stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED
        )
    assert ended.returncode == 75
    assert ended.stderr == ""
