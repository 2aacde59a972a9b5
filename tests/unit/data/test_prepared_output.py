"""A run of ``preprocess_data.py`` that was interrupted goes on where it was, to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mindspeed_lora.config.commands import parse
from mindspeed_lora.data import prepared_output
from mindspeed_lora.data import preprocess as preprocessing
from mindspeed_lora.data.preprocess import preprocess
from mindspeed_lora.data.progress import Progress
from mindspeed_lora.errors import Refused
from tests.unit.data.made_tokenizers import save_tokenizer

CHUNKS = 7


class Interrupted(BaseException):
    """In the place of a signal: nothing of the run has a chance to clean up."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessing, "_ROWS_A_CHUNK", 10)
    monkeypatch.setattr(prepared_output, "SECONDS_BETWEEN_MARKS", 0.0)


def write_rows(path: Path, weighted_from: int = 1000, count: int = 10 * CHUNKS) -> Path:
    rows: list[dict[str, Any]] = [
        {"instruction": f"Count to {i}.", "output": "one two " * (1 + i % 9)} for i in range(count)
    ]
    rows[5]["output"] = rows[5]["instruction"] = ""
    for row in rows[weighted_from:]:
        row["weight"] = 0.5
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(rows: Path, tokenizer: Path, prefix: Path, *flags: str) -> dict[str, bytes]:
    words = ["--input", str(rows), "--tokenizer-name-or-path", str(tokenizer), "--output-prefix", str(prefix)]
    preprocess(
        parse(
            "preprocess", [*words, *(() if "--json-keys" in flags else ("--prompt-type", "chatml")), *flags]
        )
    )
    return {file.name: file.read_bytes() for file in prefix.parent.iterdir()}


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The next run ends after so many chunks."""
    done = [0]

    def update(self: Progress, *arguments: Any) -> None:
        done[0] += 1
        if done[0] == after:
            raise Interrupted

    monkeypatch.setattr(Progress, "update", update)


@pytest.mark.parametrize("after", [1, 4, CHUNKS])
@pytest.mark.parametrize(
    ("flags", "weighted_from"),
    [
        ([], 1000),
        (["--workers", "2"], 25),
        (["--neat-pack", "--seq-length", "64"], 45),
        (["--pack", "--seq-length", "64"], 1000),
        (["--handler-name", "GeneralPretrainHandler", "--json-keys", "instruction", "output"], 1000),
    ],
    ids=["rows", "workers-weights", "neat-weights", "pack", "text"],
)
def test_the_same_bytes(
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    after: int,
    flags: list[str],
    weighted_from: int,
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", weighted_from)
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    expected = run(rows, tokenizer, tmp_path / "whole" / "data", *flags)
    told = capsys.readouterr().out
    with monkeypatch.context() as patched:
        interrupt(patched, after)
        with pytest.raises(Interrupted):
            run(rows, tokenizer, tmp_path / "broken" / "data", *flags)
    assert all(file.name.startswith(".") for file in (tmp_path / "broken").iterdir())
    with monkeypatch.context() as patched:
        interrupt(patched, 1)
        if after < CHUNKS:
            with pytest.raises(Interrupted):
                run(rows, tokenizer, tmp_path / "broken" / "data", *flags)
    capsys.readouterr()
    found = run(rows, tokenizer, tmp_path / "broken" / "data", *flags)
    output = capsys.readouterr()
    assert "going on after row" in output.err
    assert found == expected
    counts = [line for line in told.splitlines() if line.startswith(("rows", "tokens", "  with"))]
    assert [line for line in output.out.splitlines() if line in counts] == counts, (
        "the summary is of all rows"
    )


@pytest.mark.parametrize("change", ["rows", "flags"])
def test_another_job_starts_anew(
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    folder = tmp_path / "out"
    folder.mkdir()
    with monkeypatch.context() as patched:
        interrupt(patched, 4)
        with pytest.raises(Interrupted):
            run(rows, tokenizer, folder / "data")
    flags = ["--loss-on", "all"] if change == "flags" else []
    if change == "rows":
        write_rows(rows, count=10 * CHUNKS + 1)
    run(rows, tokenizer, folder / "data", *flags)
    assert "going on" not in capsys.readouterr().err
    assert not [file.name for file in folder.iterdir() if file.name.startswith(".")]


def test_a_cut_file_is_not_gone_on_with(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    folder = tmp_path / "out"
    folder.mkdir()
    with monkeypatch.context() as patched:
        interrupt(patched, 4)
        with pytest.raises(Interrupted):
            run(rows, tokenizer, folder / "data")
    (partial,) = folder.glob(".data_packed_labels_document.bin.tmp-*")
    partial.write_bytes(partial.read_bytes()[:-40])
    run(rows, tokenizer, folder / "data")
    assert "going on" not in capsys.readouterr().err


def test_what_is_refused_leaves_nothing(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", weighted_from=0)
    folder = tmp_path / "out"
    folder.mkdir()

    def refuse(*_: Any) -> None:
        raise Refused("no")

    monkeypatch.setattr(Progress, "update", refuse)
    with pytest.raises(Refused):
        run(rows, tokenizer, folder / "data", "--pack", "--seq-length", "64")
    assert not list(folder.iterdir())
