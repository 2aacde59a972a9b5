from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mindspeed_lora.errors import Refused
from mindspeed_lora.training.reporting.metrics import MetricsFile, read_metrics


def write(save: Path, resumed: int, *records: dict[str, object]) -> None:
    metrics = MetricsFile(save, resumed)
    for record in records:
        assert metrics.append(record) is None
    metrics.close()


def iterations(save: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in (save / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_appended_on_resume(tmp_path: Path) -> None:
    write(tmp_path, 0, {"iteration": 1}, {"iteration": 2})
    write(tmp_path, 2, {"iteration": 3})
    assert iterations(tmp_path) == [1, 2, 3]


def test_lines_after_the_resumed_iteration_are_cut(tmp_path: Path) -> None:
    write(
        tmp_path,
        0,
        *({"iteration": i, "lm_loss": 1 / 3} for i in range(1, 8)),
        {"iteration": 4, "eval_loss": 1},
    )
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    write(tmp_path, 4, {"iteration": 5, "lm_loss": 9.0})
    after = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert after[:5] == before[:4] + before[7:]
    assert iterations(tmp_path) == [1, 2, 3, 4, 4, 5]


def test_a_fresh_run_begins_an_empty_file(tmp_path: Path) -> None:
    write(tmp_path, 0, {"iteration": 0, "eval_loss": 3.0}, {"iteration": 1})
    write(tmp_path, 0, {"iteration": 1})
    assert iterations(tmp_path) == [1]


@pytest.mark.parametrize("torn", [b'{"iteration": 3, "lm_lo', b'{"iteration": 3}', b"\xff\xfe", b"\n"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    write(tmp_path, 0, {"iteration": 1}, {"iteration": 2})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert [record["iteration"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    write(tmp_path, 3, {"iteration": 4})
    assert iterations(tmp_path) == [1, 2, 4]


def test_an_untouched_file_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path, 0, {"iteration": 1})
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    write(tmp_path, 1, {"iteration": 2})
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode


def test_a_kill_while_cutting_leaves_the_old_lines(tmp_path: Path) -> None:
    write(tmp_path, 0, *({"iteration": i} for i in range(1, 10)))
    code = (
        "import os, signal, sys; from pathlib import Path; from mindspeed_lora import atomic\n"
        "atomic.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from mindspeed_lora.training.reporting.metrics import MetricsFile\n"
        "MetricsFile(Path(sys.argv[1]), 4)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert ended.returncode == -signal.SIGKILL
    assert iterations(tmp_path) == list(range(1, 10))
    write(tmp_path, 4)
    assert iterations(tmp_path) == [1, 2, 3, 4]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_kill_loses_no_line_of_a_finished_step(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from mindspeed_lora.training.reporting.metrics import MetricsFile\n"
        "metrics = MetricsFile(Path(sys.argv[1]), 0)\n"
        "for i in range(1, 6): metrics.append({'iteration': i})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert iterations(tmp_path) == [1, 2, 3, 4, 5]


@contextlib.contextmanager
def room_for_40_bytes() -> Iterator[None]:
    """A limit on the size of files stands for a full disk: part of a line is written, then an error.

    No fixture: pytest writes its progress, perhaps to a longer file, before fixtures end.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    with room_for_40_bytes():
        assert metrics.append({"iteration": 1}) is None
        assert metrics.append({"iteration": 2, "lm_loss": 1.2345678901234567}) is not None
        assert metrics.append({"iteration": 3}) is not None
        waiting = metrics.waiting
    assert iterations(tmp_path) == [1]
    assert waiting == 2
    assert metrics.append({"iteration": 4}) is None
    metrics.close()
    metrics.close()
    assert iterations(tmp_path) == [1, 2, 3, 4]


def test_a_place_that_cannot_be_written_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match=r"--save .*/file: metrics.jsonl cannot be written \(File exists\)"):
        MetricsFile(tmp_path / "file", 0)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(Refused, match="Is a directory"):
        MetricsFile(tmp_path, 0)


def test_not_a_number_never_reaches_the_file(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path, 0)
    with pytest.raises(ValueError, match="JSON"):
        metrics.append({"iteration": 1, "lm_loss": float("nan")})
    metrics.close()
