from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from mindspeed_lora.entry import run
from mindspeed_lora.errors import Failed, PeerFailure, Refused

ROOT = Path(__file__).parents[2]
ARGV = ["--load-dir", "a", "--save-dir", "b", "--save-model-type", "mg"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def status_of(function: Callable[[Any], int | None], argv: list[str] = ARGV) -> int:
    with pytest.raises(SystemExit) as left:
        run("convert", argv, function)
    assert isinstance(left.value.code, int)
    return left.value.code


def raising(error: BaseException) -> Callable[[Any], int | None]:
    def function(job: Any) -> int | None:
        raise error

    return function


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (75, 75)])
def test_the_status_is_the_functions(returned: int | None, status: int) -> None:
    assert status_of(lambda job: returned) == status


def test_the_function_gets_the_job() -> None:
    jobs: list[Any] = []
    assert status_of(jobs.append) == 0
    assert jobs[0].conversion.load_dir == "a"


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (Refused("no such layout"), 2, "error: no such layout"),
        (Failed("the file is damaged"), 1, "error: the file is damaged"),
        (KeyboardInterrupt(), 1, "error: interrupted"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/f"),
            1,
            "error: no space left on the disk: out/f",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "error: permission denied: out"),
        (OSError(errno.EIO, "Input/output error"), 1, "error: Input/output error"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "error: Broken pipe"),
        (MemoryError(), 1, "error: out of memory"),
        (ValueError("two\nlines"), 1, "error: ValueError: two lines (--debug tells where)"),
        (KeyError(), 1, "error: KeyError: no message (--debug tells where)"),
    ],
)
def test_an_error_is_one_sentence(
    error: BaseException, status: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(raising(error)) == status
    printed = capsys.readouterr()
    assert printed.err == sentence + "\n"
    assert printed.out == ""


def test_debug_prints_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(raising(ValueError("x")), [*ARGV, "--debug"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    assert printed.endswith("error: ValueError: x\n")


def test_only_rank_0_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert status_of(raising(Refused("no"))) == 2
    assert status_of(raising(Failed("damaged")), [*ARGV, "--unknown"]) == 2
    assert capsys.readouterr().err == ""


def test_another_error_names_its_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert status_of(raising(Failed("damaged"))) == 1
    assert capsys.readouterr().err == "error: rank 1: damaged\n"


def test_torchrun_quotes_the_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By torch's own reading of the file, which ends the report of a failed job."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert status_of(raising(PeerFailure(1))) == 1 and not file.exists(), "it is not the cause"
    for error in (Refused("no such layout"), Failed("the file is damaged")):
        status = status_of(raising(error))
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=status, error_file=str(file))
        assert f"traceback : error: {error}" in ChildFailedError("convert", {0: failure}).format_msg()


def test_a_rank_whose_peer_failed_leaves_silently(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(raising(PeerFailure(1))) == 1
    assert capsys.readouterr().err == ""


def test_notices_go_to_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(lambda job: None, [*ARGV, "--use-mcore-models"]) == 0
    assert capsys.readouterr() == ("", "notice: no effect here: --use-mcore-models\n")
    monkeypatch.setenv("RANK", "1")
    assert status_of(lambda job: None, [*ARGV, "--use-mcore-models"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("flag", ["--help", "-h", "--print-config"])
def test_what_only_prints_does_no_work(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(raising(AssertionError("called")), [flag]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "save-dir" in printed.out


@pytest.mark.parametrize(
    "script", ["posttrain_gpt.py", "pretrain_gpt.py", "convert_ckpt.py", "preprocess_data.py", "inference.py"]
)
def test_the_entry_files(script: str, tmp_path: Path) -> None:
    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / script), *argv]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)

    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    helped = call("--help")
    assert helped.returncode == 0
    assert helped.stdout.startswith(f"usage: {script}")
    printed = call("--print-config")
    assert (printed.returncode, printed.stderr.count("error")) == (0, 0)
    refused = call("--zzz")
    assert refused.returncode == 2
    assert refused.stderr == "error: unknown flag --zzz; --help lists the known ones\n"
    assert list(tmp_path.iterdir()) == []


SHAPE = [
    *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--ffn-hidden-size", "96"),
    *("--max-position-embeddings", "64", "--padded-vocab-size", "100", "--world-size", "2"),
    *("--tensor-model-parallel-size", "2", "--load", "your model path"),
]
DRY_RUNS = {
    "posttrain_gpt.py": [*SHAPE, "--data-path", "your data path", "--save", "run"],
    "pretrain_gpt.py": [*SHAPE, "--data-path", "your data path", "--save", "run"],
    "inference.py": [*SHAPE, "--lora-load", "your adapter path"],
    "preprocess_data.py": [
        *("--input", "your data path", "--output-prefix", "out/rows"),
        *("--tokenizer-name-or-path", "your tokenizer path"),
    ],
    "convert_ckpt.py": [
        *SHAPE[:12],
        *("--load-dir", "none", "--save-dir", "out", "--save-model-type", "mg"),
        *("--target-tensor-parallel-size", "2"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", DRY_RUNS)
def test_a_dry_run_needs_no_inputs_and_writes_nothing(script: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, str(ROOT / script), *DRY_RUNS[script], "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "is not there" in done.stderr
    assert "nothing written" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "posttrain_gpt.py"), "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
