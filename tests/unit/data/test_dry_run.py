"""``preprocess_data.py --dry-run``: what it tells, and that it writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mindspeed_lora.config.commands import parse
from mindspeed_lora.data.dry_run import dry_run
from mindspeed_lora.errors import Refused
from tests.unit.data.made_tokenizers import save_tokenizer


def job(*words: str) -> object:
    return parse("preprocess", [*words, "--dry-run"])


def test_what_would_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "Count.", "input": "", "output": "one"}]))
    before = {*tmp_path.rglob("*")}
    flags = ["--input", str(tmp_path / "rows.json"), "--tokenizer-name-or-path", str(tokenizer)]
    dry_run(job(*flags, "--output-prefix", str(tmp_path / "new" / "p")))  # type: ignore[arg-type]
    shown = capsys.readouterr()
    assert "default taken: --handler-name" in shown.err
    assert str(tmp_path / "new" / "p_packed_input_ids_document") in shown.out
    assert shown.out.endswith("dry run: everything checked, nothing written\n")
    assert {*tmp_path.rglob("*")} == before


def test_nothing_that_the_flags_name_has_to_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--input", "your data path", "--tokenizer-name-or-path", "/none", "--output-prefix", "/no/p"]
    dry_run(job(*flags))  # type: ignore[arg-type]
    shown = capsys.readouterr()
    assert (
        "--input your data path is not there" in shown.err and "the tokenizer /none is not there" in shown.err
    )


def test_rows_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "rows.json").write_text("")
    flags = ["--input", str(tmp_path / "rows.json"), "--tokenizer-name-or-path", str(tokenizer)]
    with pytest.raises(Refused, match="empty"):
        dry_run(job(*flags, "--output-prefix", str(tmp_path / "p")))  # type: ignore[arg-type]
