"""The columns of a row by what they have to hold, and how ``--map-keys`` names them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from mindspeed_lora.data.conversation import Message
from mindspeed_lora.data.readers import Row, describe
from mindspeed_lora.errors import Refused

Columns = Mapping[str, str | None]
"""What a handler calls a column → its name in the rows; None: there is none."""


def message(role: str, content: str, **more: Any) -> Message:
    """A message of a conversation."""
    return {"role": role, "content": content, **more}


def text_of(row: Row, column: str | None, optional: bool = False) -> str:
    """The text of a column; empty where there is none and that is allowed.

    Raises:
        Refused: it is missing, no text, or not valid Unicode.
    """
    value = _value(row, column)
    if value is None and optional:
        return ""
    if column not in row.values:
        raise Refused(f"{row.where}: {column} is missing; found {names(row.values)}")
    return checked_text(f"{row.where}: {column}", value)


def _value(row: Row, column: str | None) -> Any:
    """What a row has in a column; None where that is null, or what tables have in its place, not a number."""
    value = row.values.get(column) if column is not None else None
    return None if isinstance(value, float) and math.isnan(value) else value


def checked_text(where: str, value: Any) -> str:
    """A value that has to be text which a tokenizer takes."""
    if not isinstance(value, str):
        raise Refused(f"{where} is {describe(value)}; expected text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Refused(
                f"{where}: half of a surrogate pair stands at character {error.start + 1}"
            ) from error
    return value


def list_of(row: Row, column: str | None) -> Any:
    """A column that holds a list or an object; in CSV files, JSON text of one."""
    value = _value(row, column)
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise Refused(f"{row.where}: {column} is {describe(value)}; expected a list") from error


def columns(defaults: Columns, map_keys: str | Mapping[str, Any] | None) -> dict[str, str | None]:
    """The columns of a handler as ``--map-keys`` changes them; null or an empty name: the column is not read."""
    mapped = parse_map(map_keys)
    for key, column in mapped.items():
        if key not in defaults:
            raise Refused(f"--map-keys: unknown key {key}; expected some of {', '.join(defaults)}")
        if column is not None and not isinstance(column, str):
            raise Refused(f"--map-keys: {key} is {describe(column)}; expected the name of a column")
    return {**defaults, **{key: column or None for key, column in mapped.items()}}


def parse_map(map_keys: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The JSON object of ``--map-keys``."""
    if map_keys is None or isinstance(map_keys, Mapping):
        return dict(map_keys or {})
    try:
        mapped = json.loads(map_keys)
    except json.JSONDecodeError as error:
        raise Refused(f"--map-keys {map_keys}: not valid JSON ({error.msg})") from error
    if not isinstance(mapped, dict):
        raise Refused(f'--map-keys {map_keys}: expected an object like {{"prompt": "question"}}')
    return mapped


def names(values: Mapping[str, Any]) -> str:
    """The columns of a row, for messages."""
    return ", ".join(values) or "no columns"
