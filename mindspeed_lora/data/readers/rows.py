"""A row of a file, or what stands in the place of one that cannot be read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One row of a file."""

    where: str
    """File and number of the row, for messages."""
    values: dict[str, Any]
    fraction: float
    """How much of its file has been read with this row."""
    source: int = 0
    """Number of the input that the file belongs to."""

    def at(self, fraction: float, source: int) -> Row:
        """The row as one of an input that is read to ``fraction`` with it."""
        return Row(self.where, self.values, fraction, source)

    def __reduce__(self) -> tuple[type[Row], tuple[Any, ...]]:
        """Pickled as its values alone, in half the time: every row is sent to a worker."""
        return Row, (self.where, self.values, self.fraction, self.source)


@dataclass(frozen=True)
class BadRow:
    """A row that is malformed by itself; what follows it can be read."""

    problem: str
    """A sentence with file and place."""
    fraction: float
    source: int = 0

    def at(self, fraction: float, source: int) -> BadRow:
        """As :meth:`Row.at`."""
        return BadRow(self.problem, fraction, source)


def row_of(where: str, value: Any, fraction: float) -> Row | BadRow:
    """The row of a JSON value, which has to be an object."""
    if not isinstance(value, dict):
        return BadRow(f"{where}: expected an object, found {describe(value)}", fraction)
    return Row(where, value, fraction)


def describe(value: Any) -> str:
    """What a value of a row is, for messages: its kind and its beginning."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = {dict: "an object", list: "a list", str: "text", int: "the number", float: "the number"}
    kind = kinds.get(type(value), f"a {type(value).__name__}")
    return f"{kind} {shorten(_beginning(value))}"


def _beginning(value: Any) -> str:
    if isinstance(value, str):
        value = value[:100]
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        return "…"
    return text.encode("utf-8", "replace").decode()


def shorten(text: str) -> str:
    """The beginning of a text, on one line."""
    text = text.replace("\n", " ").replace("\r", " ").replace("\0", "␀")
    return text if len(text) <= 60 else text[:57] + "..."
