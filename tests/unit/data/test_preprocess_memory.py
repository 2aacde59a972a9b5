"""The whole command on a file that is much larger than what it may hold: its peak does not depend on the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mindspeed_lora.data.prepared_info import info_path, read_info
from tests.support.peak import ROOT, peak
from tests.unit.data.made_tokenizers import save_tokenizer

SMALL, LARGE = 10 << 20, 300 << 20
GROWTH = 48 << 20
"""Allowed beyond the peak at 10 MB: a sixth of what the file has more. The index alone keeps some bytes a row."""


def write(path: Path, size: int) -> int:
    """Rows of 3 kB, as lines or as one array; returns how many."""
    row = json.dumps({"instruction": "say it again " * 200, "output": "a word and another " * 20})
    first, between, last = ("[\n", ",\n", "\n]") if path.suffix == ".json" else ("", "\n", "\n")
    count = size // (len(row) + len(between))
    with path.open("w") as stream:
        stream.write(first)
        for number in range(count):
            stream.write(row if number == 0 else between + row)
        stream.write(last)
    return count


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_the_peak_does_not_grow_with_the_file(name: str, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    peaks = {}
    for size in (SMALL, LARGE):
        file, prefix = tmp_path / f"{size}" / name, tmp_path / f"{size}" / "out"
        file.parent.mkdir()
        count = write(file, size)
        words = ["--input", str(file), "--output-prefix", str(prefix), "--workers", "1"]
        words += [
            "--tokenizer-name-or-path",
            str(tokenizer),
            "--handler-name",
            "AlpacaStyleInstructionHandler",
        ]
        words += ["--prompt-type", "chatml", "--seq-length", "4096"]
        peaks[size] = peak(str(ROOT / "preprocess_data.py"), *words)
        info = read_info(prefix)
        assert info_path(prefix).is_file() and info is not None and info.num_documents == count
        file.unlink()
    assert peaks[LARGE] < peaks[SMALL] + GROWTH, {size >> 20: found >> 20 for size, found in peaks.items()}
