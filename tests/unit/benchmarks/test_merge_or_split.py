"""Merging against splitting runs on the CPU too, and its rows are whole."""

from __future__ import annotations

import json
from pathlib import Path

import merge_or_split
import pytest


def test_every_linear_and_number_of_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "found.json"
    words = ["--shapes", "tiny", "--tokens", "8", "4096", "--device", "cpu", "--json", str(target)]
    assert merge_or_split.main(words) == 0
    rows = json.loads(target.read_text())["rows"]
    assert [(row["linear"], row["tokens"]) for row in rows] == [
        (f"tiny {linear}", tokens) for linear in ("linear_qkv", "linear_fc2") for tokens in (8, 4096)
    ]
    assert all(row["split_seconds"] > 0 and row["merged_seconds"] > 0 for row in rows)
    assert "split / merged" in capsys.readouterr().out
