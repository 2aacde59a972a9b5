"""The words of ``--data-path`` and of the files that hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mindspeed_lora.config.blend import parse_blend
from mindspeed_lora.config.commands import parse
from mindspeed_lora.config.data import DataConfig
from mindspeed_lora.errors import Refused

FLAGS = ["--load", "model", "--lora-r", "4"]


@pytest.mark.parametrize(
    ("words", "paths", "weights"),
    [
        (["A"], ("A",), None),
        (["7"], ("7",), None),
        (["A", "B"], ("A", "B"), None),
        (["A", "B", "C"], ("A", "B", "C"), None),
        (["0.3", "A", "0.7", "B"], ("A", "B"), (0.3, 0.7)),
        (["1e1", "A"], ("A",), (10.0,)),
    ],
)
def test_words(words: list[str], paths: tuple[str, ...], weights: tuple[float, ...] | None) -> None:
    spec = parse_blend(words, "--data-path")
    assert (spec.paths, spec.weights) == (paths, weights)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["0.3", "A", "B"], "B stands where a weight is expected"),
        (["0.3", "A", "B", "C"], "B stands where a weight is expected"),
        (["A", "0.3"], "A stands where a weight is expected"),
        (["0", "A", "1", "B"], "the weight of A is 0; expected a number above 0"),
        (["nan", "A", "1", "B"], "the weight of A is nan"),
    ],
)
def test_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        parse_blend(words, "--data-path")


def data(*words: object) -> DataConfig:
    return parse("posttrain", [*FLAGS, *map(str, words)], {}).data


def test_the_flags() -> None:
    found = data("--data-path", "0.3", "A", "0.7", "B", "--valid-data-path", "C", "D")
    assert (found.data_path, found.valid_data_path) == (("0.3", "A", "0.7", "B"), ("C", "D"))
    assert data("--train-data-path", "A", "--split", "90,10").train_data_path == ("A",)
    with pytest.raises(Refused, match="--data-path is missing"):
        data()
    with pytest.raises(Refused, match="--data-path is still the placeholder 'your data path'"):
        data("--data-path", "your", "data", "path")
    with pytest.raises(Refused, match="--data-path and --train-data-path both"):
        data("--data-path", "A", "--train-data-path", "B")
    with pytest.raises(Refused, match="--test-data-path is given, but --eval-iters"):
        data("--data-path", "A", "--test-data-path", "B")


def test_words_in_files(tmp_path: Path) -> None:
    words, parts = tmp_path / "words", tmp_path / "parts.json"
    words.write_text("0.3 A\n0.7 B\n")
    assert data("--data-args-path", words).data_path == ("0.3", "A", "0.7", "B")
    words.write_text("0.3 A\n0.7 B\n", encoding="utf-8-sig")
    assert data("--data-args-path", words).data_path == ("0.3", "A", "0.7", "B")
    parts.write_text(json.dumps({"train": [0.3, "A", 0.7, "B"], "valid": ["C"], "test": None}))
    found = data("--per-split-data-args-path", parts, "--eval-iters", 1)
    assert found.train_data_path == ("0.3", "A", "0.7", "B")
    assert (found.valid_data_path, found.test_data_path, found.data_path) == (("C",), None, None)
    with pytest.raises(Refused, match="--data-args-path and --data-path both"):
        data("--data-args-path", words, "--data-path", "A")
    for content in ("", "[1]", '{"train": []}', '{"train": ["A"], "tests": ["B"]}', '{"train": "A"}'):
        parts.write_text(content)
        with pytest.raises(Refused, match="--per-split-data-args-path"):
            data("--per-split-data-args-path", parts)
    with pytest.raises(Refused, match="cannot be read"):
        data("--data-args-path", tmp_path / "nothing")
    job = parse("posttrain", [*FLAGS, "--data-args-path", str(tmp_path / "nothing"), "--dry-run"], {})
    assert any("is not there" in notice for notice in job.notices)
