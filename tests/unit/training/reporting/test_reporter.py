from __future__ import annotations

import json
import os
import pty
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mindspeed_lora.config.logging import LoggingConfig
from mindspeed_lora.training.reporting import (
    EvaluationRecord,
    ModelFlops,
    ParameterCounts,
    Reporter,
)
from tests.unit.training.reporting.records import step_record


class Clock:
    """A clock that goes on when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(
    save: Path | None, last: int, resumed: int = 0, logging: LoggingConfig | None = None, seconds: float = 1.0
) -> None:
    """A run of steps of so many seconds, with an evaluation every third and a save at the end."""
    clock = Clock()
    logging = LoggingConfig() if logging is None else logging
    with Reporter(logging, save, last, 8, resumed, is_terminal=False, clock=clock) as reporter:
        for iteration in range(resumed + 1, last + 1):
            clock.now += seconds
            reporter.step(step_record(iteration))
            if iteration % 3 == 0:
                reporter.evaluation(EvaluationRecord(iteration, 2.5, 100))
        if save is not None:
            reporter.saved(save / "iter_0000007", 1.25)
        reporter.finish()


def test_a_run_leaves_metrics_events_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, 7)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "lm_loss" in line] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["iteration"] for line in lines if "eval_loss" in line] == [3, 6]
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "metrics.jsonl", "tensorboard"]
    output = capsys.readouterr().out
    assert output.count(" | lm loss: ") == 7
    assert output.count(" validation loss at iteration ") == 2
    saved = f"  successfully saved checkpoint from iteration       7 to {tmp_path}/iter_0000007 (1.2 s)"
    assert saved in output
    assert f"  loss curve: {tmp_path}/loss.png" in output


def test_a_resumed_run_goes_on_in_the_same_files(tmp_path: Path) -> None:
    run(tmp_path, 6)
    run(tmp_path, 8, resumed=4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "lm_loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("lm loss")] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_lines_follow_the_interval(capsys: pytest.CaptureFixture[str]) -> None:
    run(None, 7, logging=LoggingConfig(log_interval=3))
    lines = [line for line in capsys.readouterr().out.splitlines() if "iteration (ms)" in line]
    assert len(lines) == 2
    assert "iteration        3/       7 |" in lines[0]
    assert f"lm loss: {2 + (1 + 1 / 2 + 1 / 3) / 3:.6E} |" in lines[0]
    assert f"lm loss: {2 + (1 / 4 + 1 / 5 + 1 / 6) / 3:.6E} |" in lines[1]


def test_off_a_terminal_progress_comes_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    run(None, 60, logging=LoggingConfig(log_interval=1000), seconds=1.0)
    output = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in output.splitlines() if line.startswith(" progress ")] == [
        f" progress {iteration}/60 {iteration / 60:4.0%}" for iteration in range(10, 61, 10)
    ]
    assert "\r" not in output and "\x1b" not in output


def test_throughput_only_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    flops = ModelFlops(per_token=1e9, per_token_and_length=0.0)
    for asked in (False, True):
        config = LoggingConfig(log_throughput=asked)
        Reporter(config, None, 9, 8, is_terminal=False, world_size=2, model_flops=flops).step(step_record())
        assert ("(TFLOP/s/GPU): 2.0 |" in capsys.readouterr().out) is asked


def test_layout_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(LoggingConfig(), None, 9, 8, is_terminal=False)
    reporter.layout([("tensor parallel", "2")], ParameterCounts(total=200, trainable=50))
    output = capsys.readouterr().out
    assert " tensor parallel | 2\n" in output
    assert "trainable params: 50 || all params: 200 || trainable%: 25.0000\n" in output


def test_without_save_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(None, 3)
    assert os.listdir(tmp_path) == []


def test_events_go_where_the_user_says(tmp_path: Path) -> None:
    run(tmp_path / "run", 3, logging=LoggingConfig(tensorboard_dir=str(tmp_path / "events")))
    assert len(os.listdir(tmp_path / "events")) == 1
    assert sorted(os.listdir(tmp_path / "run")) == ["loss.png", "metrics.jsonl"]


def test_a_picture_that_cannot_be_written_is_a_notice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loss.png").mkdir()
    run(tmp_path, 3)
    assert "notice: loss.png is not drawn: " in capsys.readouterr().err


def test_a_full_disk_under_the_metrics_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    reporter = Reporter(LoggingConfig(), tmp_path, 9, 8, is_terminal=False)
    # A limit on the size of files stands for a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        reporter.step(step_record(1))
        reporter.step(step_record(2))
        reporter.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    notices = [line for line in capsys.readouterr().err.splitlines() if "metrics.jsonl" in line]
    assert len(notices) == 2
    assert "cannot be written now: File too large" in notices[0]
    assert notices[1].endswith("metrics.jsonl lacks its last 2 lines")


def test_the_other_ranks_say_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter.silent() as reporter:
        reporter.notice("something")
        reporter.layout([("a", "b")])
        reporter.step(step_record())
        reporter.evaluation(EvaluationRecord(1, 2.0, 3))
        reporter.saved(tmp_path, 1.0)
        reporter.finish()
    assert capsys.readouterr() == ("", "")
    assert os.listdir(tmp_path) == []


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = (
        "import sys; import mindspeed_lora.training.reporting, mindspeed_lora.training.signals\n"
        "heavy = {'torch', 'matplotlib', 'tensorboard', 'numpy', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


LIVE = """
from mindspeed_lora.config.logging import LoggingConfig
from mindspeed_lora.training.reporting import Reporter, StepRecord
now = [0.0]
with Reporter(LoggingConfig(log_interval=2), None, 4, 8, clock=lambda: now[0]) as reporter:
    for i in range(1, 5):
        now[0] += 2.0
        reporter.step(StepRecord(iteration=i, consumed_samples=8 * i, lm_loss=2.0, grad_norm=1.0,
                                 learning_rate=1e-4, tokens=100, loss_tokens=50, elapsed_ms=2000.0,
                                 peak_memory_bytes=2**30))
    reporter.finish()
"""


def test_a_real_terminal_has_a_live_line_below() -> None:
    master, slave = pty.openpty()
    environment = os.environ | {"COLUMNS": "300"}
    child = subprocess.Popen([sys.executable, "-c", LIVE], stdout=slave, env=environment)
    os.close(slave)
    written = b""
    try:
        while chunk := os.read(master, 4096):
            written += chunk
    except OSError:  # How Linux tells that the other side of a terminal is closed.
        pass
    os.close(master)
    assert child.wait(60) == 0
    text = written.decode()
    assert "\r [####------------] 1/4  25% | ETA 0:00:06 | loss 2.0000 | 50 tokens/s" in text
    # The iteration line takes the live line's row, which is drawn again below it.
    before, after = text.split("\r\x1b[K [", 1)[1].split("peak memory (GiB): 1.00 |\r\n", 1)
    assert "iteration        2/       4" in before
    assert after.startswith(" [####------------] 1/4")
    assert text.endswith("\r\n")
    assert "[################] 4/4 100% | ETA 0:00:00" in text
