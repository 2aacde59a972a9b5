"""``dataset_info.json`` of LLaMA-Factory: files, columns and form of data sets by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_lora.config.nearest import did_you_mean
from mindspeed_lora.data.handlers import (
    ALPACA,
    ALPACA_PAIRS,
    OPENAI,
    PRETRAIN,
    SHAREGPT,
    SHAREGPT_PAIRS,
    Handler,
    make_handler,
)
from mindspeed_lora.errors import Refused

FILE_NAME = "dataset_info.json"
_REMOTE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_KEYS = (
    *("file_name", "formatting", "ranking", "columns", "tags", "num_samples", "split", "subset", "folder"),
    "file_sha1",
    *_REMOTE,
)
OPENAI_PAIRS = "OpenAI pairs"
_OPENAI_TAGS = {
    **{"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    **{"observation_tag": "tool", "function_tag": "function_call", "system_tag": "system"},
}
_NOT_TEXT = ("images", "videos", "audios")
_ASKED = ("prompt", "query")
_ONLY_WHERE_NAMED = ("system", "tools", "history")
"""Columns that are not read unless an entry names them."""
_NAMES_TOLD = 20


@dataclass(frozen=True)
class DescribedSet:
    """One entry."""

    path: Path
    """A file or a folder."""
    handler: Handler
    num_samples: int | None = None


def read_dataset_info(folder: str | Path, names: list[str]) -> list[DescribedSet]:
    """The data sets of that names, in their order.

    Raises:
        Refused: the file or an entry is missing or malformed, or asks for what is not read here.
    """
    path = Path(folder) / FILE_NAME
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise Refused(
            f"{path}: cannot be read ({error.strerror}); --dataset-dir names the folder that has it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path}: not valid JSON ({error})") from error
    if not isinstance(entries, dict):
        raise Refused(f"{path}: expected an object of data sets by name")
    found = []
    for name in names:
        if name not in entries:
            raise Refused(f"--input {name}: not in {path}; {_names_of(name, list(entries))}")
        if not isinstance(entries[name], dict):
            raise Refused(f"{path}: {name} is not an object")
        found.append(_described(path, name, entries[name]))
    return found


def _names_of(name: str, known: list[str]) -> str:
    more = f" and {len(known) - _NAMES_TOLD} more" if len(known) > _NAMES_TOLD else ""
    return f"it has {', '.join(known[:_NAMES_TOLD])}{more}{did_you_mean(name, known)}"


def _described(path: Path, name: str, entry: Mapping[str, Any]) -> DescribedSet:
    where = f"{path}: {name}"
    for key in entry:
        if key not in _KEYS:
            raise Refused(f"{where}: unknown key {key}; expected some of {', '.join(_KEYS)}")
    if not isinstance(entry.get("file_name"), str):
        remote = ", ".join(key for key in _REMOTE if key in entry) or "no file_name"
        raise Refused(
            f"{where} has {remote}; only files are read here: put them beside {path.name}, name file_name"
        )
    for key, usual in (("split", "train"), ("subset", None), ("folder", None)):
        if entry.get(key, usual) not in (usual, None):
            raise Refused(f"{where}: {key} {entry[key]} is of remote data sets; only files are read here")
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if not isinstance(columns, dict) or not isinstance(tags, dict):
        raise Refused(f"{where}: columns and tags have to be objects")
    for key in _NOT_TEXT:
        if columns.get(key):
            raise Refused(f"{where}: the column {key} is not text, which alone is trained here")
    if columns.get("kto_tag"):
        raise Refused(
            f"{where}: kto_tag names the column {columns['kto_tag']} for KTO training, which is not done here"
        )
    num_samples = entry.get("num_samples")
    if num_samples is not None and (not isinstance(num_samples, int) or num_samples < 1):
        raise Refused(f"{where}: num_samples is {num_samples!r}; expected an integer of at least 1")
    named = {key: column or None for key, column in columns.items() if key not in (*_NOT_TEXT, "kto_tag")}
    name = _handler_name(where, entry)
    if name == ALPACA and named.get("prompt") and not named.get("response"):
        text = make_handler(PRETRAIN, {"text": named["prompt"]})
        return DescribedSet(path.parent / entry["file_name"], text, num_samples)
    map_keys = _map_keys(name, named)
    if name in (OPENAI, OPENAI_PAIRS):
        name, tags = _by_openai_tags(name, tags)
        map_keys = {"messages": "messages", **map_keys}
    tagged = {"tags": tags} if tags and name in (SHAREGPT, SHAREGPT_PAIRS) else {}
    try:
        handler = make_handler(name, {**map_keys, **tagged})
    except Refused as error:
        raise Refused(f"{where}: {str(error).removeprefix('--map-keys: ')}") from error
    return DescribedSet(path.parent / entry["file_name"], handler, num_samples)


def _map_keys(name: str, named: Mapping[str, Any]) -> dict[str, Any]:
    """As LLaMA-Factory has it: an entry that names some columns has no others, and system text, tools and history
    are never read unless they are named. Where it names none of what is asked and answered, the usual ones hold."""
    alpaca = name in (ALPACA, ALPACA_PAIRS)
    absent = [key for key in _ONLY_WHERE_NAMED if alpaca or key != "history"]
    if alpaca and any(named.get(key) for key in _ASKED):
        absent += _ASKED
    return {**dict.fromkeys(absent), **named}


def _handler_name(where: str, entry: Mapping[str, Any]) -> str:
    formatting, ranking = entry.get("formatting", "alpaca"), entry.get("ranking", False)
    handlers = {
        ("alpaca", False): ALPACA,
        ("alpaca", True): ALPACA_PAIRS,
        ("sharegpt", False): SHAREGPT,
        ("sharegpt", True): SHAREGPT_PAIRS,
        ("openai", False): OPENAI,
        ("openai", True): OPENAI_PAIRS,
    }
    if not isinstance(ranking, bool) or (formatting, ranking) not in handlers:
        raise Refused(
            f"{where}: formatting {formatting} with ranking {ranking} is unknown; expected alpaca, sharegpt or "
            "openai, with or without ranking"
        )
    return handlers[formatting, ranking]


def _by_openai_tags(name: str, tags: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Messages of OpenAI with tags of their own, or in pairs, are ShareGPT's with other tags."""
    named = {**_OPENAI_TAGS, **tags}
    if name == OPENAI_PAIRS:
        return SHAREGPT_PAIRS, named
    return (OPENAI, {}) if named == _OPENAI_TAGS else (SHAREGPT, named)
