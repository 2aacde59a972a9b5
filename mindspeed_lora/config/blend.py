"""What the words of ``--data-path`` and its like name: one data set, or several with or without weights."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_lora.config.data import DataConfig
from mindspeed_lora.errors import Refused

_PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class BlendSpec:
    """Data sets and their weights."""

    paths: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    """As they were given; None: by the sizes."""

    def __str__(self) -> str:
        if self.weights is None:
            return " ".join(self.paths)
        return " ".join(f"{weight:g} {path}" for weight, path in zip(self.weights, self.paths, strict=True))


def parse_blend(words: Sequence[str], flag: str) -> BlendSpec:
    """``A``, ``A B …`` or ``0.3 A 0.7 B …``.

    Raises:
        Refused: some data sets have a weight and others none, or a weight is not above 0.
    """
    given, numbers = f"{flag} {' '.join(words)}", [_number(word) for word in words]
    if len(words) == 1 or all(number is None for number in numbers):
        return BlendSpec(tuple(words))
    lacking = [word for word, number in zip(words[::2], numbers[::2], strict=True) if number is None]
    if lacking or len(words) % 2:
        stray = lacking[0] if lacking else words[-1]
        raise Refused(
            f"{given}: {stray} stands where a weight is expected; give every data set a weight, or none"
        )
    weights = tuple(number for number in numbers[::2] if number is not None)
    for weight, path in zip(weights, words[1::2], strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise Refused(f"{given}: the weight of {path} is {weight:g}; expected a number above 0")
    return BlendSpec(tuple(words[1::2]), weights)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def with_listed_data(config: DataConfig, dry_run: bool = False) -> tuple[DataConfig, list[str]]:
    """The words of ``--data-args-path`` and ``--per-split-data-args-path`` in place of these files.

    A dry run does without a file that is not there, and tells it by a notice.

    Raises:
        Refused: a file cannot be read, or two flags name the same data.
    """
    notices = []
    for name in ("data_args_path", "per_split_data_args_path") if dry_run else ():
        path = getattr(config, name)
        if path is not None and not Path(path).exists():
            notices.append(f"--{name.replace('_', '-')} {path} is not there: full rows are assumed")
            left_out: dict[str, Any] = {name: None}
            config = dataclasses.replace(config, **left_out)
    if config.data_args_path is not None:
        _refuse_two("--data-args-path", config, ("data_path", "train_data_path", "per_split_data_args_path"))
        words = tuple(_read(config.data_args_path, "--data-args-path").split())
        if not words:
            raise Refused(
                f"--data-args-path {config.data_args_path}: the file is empty; expected 0.3 A 0.7 B"
            )
        config = dataclasses.replace(config, data_path=words, data_args_path=None)
    if config.per_split_data_args_path is not None:
        names = [f"{part}_data_path" for part in _PARTS]
        _refuse_two("--per-split-data-args-path", config, ("data_path", *names))
        lists = _per_split(config.per_split_data_args_path)
        values: dict[str, Any] = {name: lists.get(part) for name, part in zip(names, _PARTS, strict=True)}
        config = dataclasses.replace(config, **values, per_split_data_args_path=None)
    if config.data_path is not None and config.train_data_path is not None:
        raise Refused(
            "--data-path and --train-data-path both name the data of the training; give one of them"
        )
    return config, notices


def _refuse_two(flag: str, config: DataConfig, others: Sequence[str]) -> None:
    for name in others:
        if getattr(config, name) is not None:
            raise Refused(f"{flag} and --{name.replace('_', '-')} both name the data; give one of them")


def _per_split(path: str) -> Mapping[str, tuple[str, ...] | None]:
    """The words of each part that the file names."""
    try:
        content: Any = json.loads(_read(path, "--per-split-data-args-path"))
    except ValueError as error:
        raise Refused(f"--per-split-data-args-path {path}: not JSON ({error})") from error
    if not isinstance(content, dict) or not content.get("train") or set(content) - set(_PARTS):
        raise Refused(
            f'--per-split-data-args-path {path}: expected an object like {{"train": [0.3, "A", 0.7, "B"], "valid": '
            '["C"], "test": null}'
        )
    for part, words in content.items():
        if not (words is None or isinstance(words, list)):
            raise Refused(f"--per-split-data-args-path {path}: {part} is no list of weights and prefixes")
    return {part: tuple(map(str, words)) if words else None for part, words in content.items()}


def _read(path: str, flag: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise Refused(f"{flag} {path}: cannot be read ({reason}); name a text file") from error
