"""Raw rows given to a training: prepared once, found again, never half."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mindspeed_lora.config.commands import parse
from mindspeed_lora.data import prepared_output, raw_rows
from mindspeed_lora.data.prepared_info import info_path, read_info
from mindspeed_lora.data.preprocess import preprocess
from mindspeed_lora.data.raw_rows import CACHE_FOLDER, RawRows, holds_raw_rows, training_prefix
from mindspeed_lora.data.row_work import InstructionWork
from mindspeed_lora.errors import Refused
from tests.unit.data.made_tokenizers import save_tokenizer

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "model")


def write_rows(path: Path, count: int = 600) -> Path:
    rows = [{"instruction": f"Count to {i}.", "output": "one two " * (1 + i % 9)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def raw(rows: Path, tokenizer: Path, *flags: str, prefix: Path | None = None) -> RawRows:
    words = ["--input", str(rows), "--tokenizer-name-or-path", str(tokenizer), "--output-prefix", "x"]
    job = parse("preprocess", [*words, "--prompt-type", "chatml", *flags])
    config = dataclasses.replace(job.preprocess, output_prefix=None if prefix is None else str(prefix))
    return RawRows(dataclasses.replace(job, preprocess=config))


def data(prefix: str | Path) -> dict[str, bytes]:
    """The bytes of a prepared set, by the ends of its files' names."""
    prefix = Path(prefix)
    files = prefix.parent.glob(f"{prefix.name}_packed_*_document.*")
    return {file.name.removeprefix(prefix.name): file.read_bytes() for file in files}


def by_hand(rows: Path, tokenizer: Path, folder: Path, *flags: str) -> dict[str, bytes]:
    words = [
        "--input",
        str(rows),
        "--tokenizer-name-or-path",
        str(tokenizer),
        "--prompt-type",
        "chatml",
        *flags,
    ]
    preprocess(parse("preprocess", [*words, "--output-prefix", str(folder / "by_hand")]))
    return data(folder / "by_hand")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "rows").mkdir()
    return write_rows(tmp_path / "rows" / "rows.jsonl")


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prefixes that were prepared."""
    prepared: list[str] = []

    def counted(job: Any, source: str | None = None) -> Any:
        prepared.append(job.preprocess.output_prefix)
        return preprocess(job, source)

    monkeypatch.setattr(raw_rows, "preprocess", counted)
    return prepared


def test_what_is_raw(rows: Path, tokenizer: Path) -> None:
    prefix = raw(rows, tokenizer).prepared()
    assert holds_raw_rows(str(rows)) and holds_raw_rows(str(rows.parent))
    assert not holds_raw_rows(prefix) and not holds_raw_rows("/nowhere/rows.jsonl")


def test_prepared_once_as_by_hand(rows: Path, tokenizer: Path, tmp_path: Path, count: list[str]) -> None:
    prefix = raw(rows, tokenizer).prepared()
    assert Path(prefix).parent.parent == rows.parent / CACHE_FOLDER
    assert raw(rows, tokenizer, "--workers", "2").prepared() == prefix
    assert count == [prefix]
    assert data(prefix) == by_hand(rows, tokenizer, tmp_path)
    assert training_prefix(prefix, "sft") == prefix


@pytest.mark.parametrize("flags", [["--loss-on", "all"], ["--append-eod"], ["--pack", "--seq-length", "64"]])
def test_other_flags_are_another_set(
    rows: Path, tokenizer: Path, tmp_path: Path, count: list[str], flags: list[str]
) -> None:
    found = {raw(rows, tokenizer).prepared(), raw(rows, tokenizer, *flags).prepared()}
    assert len(found) == len(count) == 2
    assert data(raw(rows, tokenizer, *flags).prepared()) == by_hand(rows, tokenizer, tmp_path, *flags)


def test_other_rows_or_another_tokenizer_are_another_set(
    rows: Path, tokenizer: Path, tmp_path: Path, count: list[str]
) -> None:
    first = raw(rows, tokenizer).prepared()
    second = raw(rows, save_tokenizer(tmp_path / "other", "llama3")).prepared()
    times = rows.stat().st_mtime_ns
    rows.write_text(rows.read_text().replace("Count", "Court"))
    os.utime(rows, ns=(times, times))
    assert len({first, second, raw(rows, tokenizer).prepared()}) == len(count) == 3


def test_a_place_of_the_users(rows: Path, tokenizer: Path, tmp_path: Path, count: list[str]) -> None:
    prefix = tmp_path / "mine" / "data"
    assert raw(rows, tokenizer, prefix=prefix).prepared() == str(prefix)
    raw(rows, tokenizer, prefix=prefix).prepared()
    assert len(count) == 1
    raw(rows, tokenizer, "--loss-on", "all", prefix=prefix).prepared()
    assert len(count) == 2, "a set that a training made is replaced"
    by_hand(rows, tokenizer, tmp_path)
    with pytest.raises(Refused, match="--output-prefix .*by_hand: prepared data that were not made"):
        raw(rows, tokenizer, prefix=tmp_path / "by_hand").prepared()
    info_path(tmp_path / "by_hand").unlink()
    with pytest.raises(Refused, match="were not made from these rows"):
        raw(rows, tokenizer, prefix=tmp_path / "by_hand").prepared()


def test_a_folder_that_cannot_be_written_to(
    rows: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_rows, "_can_be_made", lambda folder: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert raw(rows, tokenizer).prepared().startswith(str(tmp_path / "cache" / "mindspeed_lora"))


def test_what_is_refused_leaves_no_folder(tokenizer: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"other": "column"}) + "\n" for _ in range(3)))
    with pytest.raises(Refused):
        raw(rows, tokenizer).prepared()
    with pytest.raises(Refused):
        raw(rows, tokenizer, prefix=tmp_path / "new" / "newer" / "rows").prepared()
    with pytest.raises(Refused):
        by_hand(rows, tokenizer, tmp_path / "new" / "newer", "--max-bad-rows", "1.0")
    assert list(tmp_path.iterdir()) == [rows]


def test_plain_text_is_for_the_other_command(rows: Path, tokenizer: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"one two {i}"}) + "\n" for i in range(5)))
    words = ["--input", str(text), "--tokenizer-name-or-path", str(tokenizer), "--output-prefix", "x"]
    job = parse("preprocess", words)
    made = RawRows(
        dataclasses.replace(job, preprocess=dataclasses.replace(job.preprocess, output_prefix=None))
    )
    prefix = made.prepared()
    assert made.prepared() == prefix
    assert training_prefix(prefix, "pretrain") == f"{prefix}_text_document"
    with pytest.raises(Refused, match=r"plain text, which pretrain_gpt\.py"):
        training_prefix(prefix, "sft")
    with pytest.raises(Refused, match=r"instruction rows, which posttrain_gpt\.py"):
        training_prefix(raw(rows, tokenizer).prepared(), "pretrain")


def test_pairs_are_not_trained_on(tmp_path: Path, tokenizer: Path) -> None:
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(json.dumps({"instruction": "Q", "chosen": "yes", "rejected": "no"}))
    prefix = raw(rows, tokenizer).prepared()
    with pytest.raises(
        Refused, match="pairs of a chosen and a rejected answer, on which nothing here trains"
    ):
        training_prefix(prefix, "sft")


def slow_work(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.05) -> None:
    """Every chunk takes its time, and is noted."""
    inner = InstructionWork.__call__

    def work(self: InstructionWork, chunk: Any) -> Any:
        time.sleep(seconds)
        return inner(self, chunk)

    monkeypatch.setattr(InstructionWork, "__call__", work)
    monkeypatch.setattr(prepared_output, "SECONDS_BETWEEN_MARKS", 0.0)


def started(target: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    process = FORK.Process(target=target, args=arguments)
    process.start()
    return process


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("flags", [[], ["--neat-pack", "--seq-length", "64"]], ids=str)
def test_a_killed_process_leaves_nothing_that_is_used(
    rows: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], capfd: Any
) -> None:
    expected = by_hand(rows, tokenizer, tmp_path, *flags)
    slow_work(monkeypatch)
    process = started(lambda: raw(rows, tokenizer, *flags).prepared() and None)
    cache = rows.parent / CACHE_FOLDER
    wait_for(
        lambda: any(json.loads(p.read_text())["chunks"] >= 2 for p in cache.glob("*/.*_preparing.tmp-*[0-9]"))
    )
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not list(cache.glob("*/*_info.json"))
    prefix = raw(rows, tokenizer, *flags).prepared()
    assert data(prefix) == expected
    assert "going on after row" in capfd.readouterr().err
    left = [file.name for file in Path(prefix).parent.iterdir()]
    assert sorted(left) == sorted(
        [".rows.lock", "rows_packed_info.json", *(f"rows{end}" for end in expected)]
    )


def test_one_process_of_a_node_prepares_and_the_others_wait(
    rows: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_work(monkeypatch)
    log = tmp_path / "log"

    def noted(job: Any, source: str | None = None) -> Any:
        with log.open("a") as stream:
            stream.write(f"{os.environ['LOCAL_RANK']}\n")
        return preprocess(job, source)

    monkeypatch.setattr(raw_rows, "preprocess", noted)

    def rank(number: int) -> None:
        os.environ["LOCAL_RANK"] = str(number)
        time.sleep(0.3 * (number == 0))
        prefix = raw(rows, tokenizer).prepared()
        assert read_info(prefix) is not None

    processes = [started(rank, number) for number in (2, 1, 0)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text().split() == ["0"]


def test_without_a_first_process_another_one_prepares(
    rows: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, count: list[str]
) -> None:
    monkeypatch.setattr(raw_rows, "_SECONDS_FOR_THE_FIRST", 0.3)
    raw(rows, tokenizer).prepared({"LOCAL_RANK": "3"})
    assert len(count) == 1


def test_a_place_of_the_users_inside_of_the_folder_of_rows(
    rows: Path, tokenizer: Path, count: list[str]
) -> None:
    for _ in range(2):
        raw(rows.parent, tokenizer, prefix=rows.parent / "made").prepared()
    assert len(count) == 1, "what was made is none of the rows"
