"""What the rows of a data set mean: each handler turns a row's columns into a conversation or into texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from mindspeed_lora.data.conversation import Message, UnusableRow
from mindspeed_lora.data.prompt_template import CONTENT, prompt_template
from mindspeed_lora.data.readers import Row, describe
from mindspeed_lora.errors import Refused

ALPACA = "AlpacaStyleInstructionHandler"
OPENAI = "OpenAIInstructionHandler"
PRETRAIN = "GeneralPretrainHandler"
ALPACA_PRETRAIN = "AlpacaPretrainHandler"
HANDLER_NAMES = (ALPACA, OPENAI, PRETRAIN, ALPACA_PRETRAIN)

_ALPACA_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
}
_OPENAI_COLUMNS = {"messages": "messages", "system": "system"}
_ROLES = {"developer": "system", "human": "user", "gpt": "assistant"}
_KNOWN_ROLES = ("system", "user", "assistant", "tool", "function", "observation", "function_call")


class InstructionHandler(Protocol):
    """Rows that are conversations."""

    def messages(self, row: Row) -> list[Message]:
        """The conversation of a row.

        Raises:
            Refused: the row is malformed.
            UnusableRow: there is nothing to train in it.
        """
        ...


@runtime_checkable
class TextHandler(Protocol):
    """Rows that are plain text, for next-token training."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the data sets that are written, one text each from every row."""
        ...

    def texts(self, row: Row) -> tuple[str, ...]:
        """The texts of a row, in the order of ``keys``."""
        ...


def make_handler(
    name: str, map_keys: str | None = None, json_keys: Sequence[str] = ("text",)
) -> InstructionHandler | TextHandler:
    """The handler of that name; ``map_keys`` is the JSON text of ``--map-keys``."""
    if name == ALPACA:
        return AlpacaHandler(_columns(_ALPACA_COLUMNS, map_keys))
    if name == OPENAI:
        return OpenAIHandler(_columns(_OPENAI_COLUMNS, map_keys))
    if name == ALPACA_PRETRAIN:
        return AlpacaPretrainHandler(_columns(_ALPACA_COLUMNS, map_keys))
    if name == PRETRAIN:
        columns = _columns({key: key for key in json_keys}, map_keys)
        return PretrainHandler(tuple(json_keys), columns)
    raise Refused(f"--handler-name {name}: unknown; expected one of {', '.join(HANDLER_NAMES)}")


def guess_handler(row: Row, map_keys: str | None = None) -> str:
    """The name of the handler that fits the columns of a row."""
    mapped = _parse_map(map_keys)
    if mapped.get("messages", "messages") in row.values:
        return OPENAI
    if mapped.get("response", "output") in row.values:
        return ALPACA
    if set(row.values) == {"text"}:
        return PRETRAIN
    raise Refused(
        f"{row.where}: cannot tell what the columns {_names(row.values)} mean; give --handler-name "
        f"({', '.join(HANDLER_NAMES)}), and --map-keys where columns have other names"
    )


def _columns(defaults: Mapping[str, str], map_keys: str | None) -> dict[str, str]:
    mapped = _parse_map(map_keys)
    for key, column in mapped.items():
        if key not in defaults:
            raise Refused(f"--map-keys: unknown key {key}; expected some of {', '.join(defaults)}")
        if not isinstance(column, str):
            raise Refused(f"--map-keys: {key} is {describe(column)}; expected the name of a column")
    return {**defaults, **mapped}


def _parse_map(map_keys: str | None) -> dict[str, Any]:
    if map_keys is None:
        return {}
    try:
        mapped = json.loads(map_keys)
    except json.JSONDecodeError as error:
        raise Refused(f"--map-keys {map_keys}: not valid JSON ({error.msg})") from error
    if not isinstance(mapped, dict):
        raise Refused(f'--map-keys {map_keys}: expected an object like {{"prompt": "question"}}')
    return mapped


@dataclass(frozen=True)
class AlpacaHandler:
    """Rows with instruction, input and output, and perhaps a history of earlier turns and a system text."""

    columns: Mapping[str, str]

    def messages(self, row: Row) -> list[Message]:
        """System text, earlier turns, then instruction and input (joined by a line feed) and output."""
        prompt = _text(row, self.columns["prompt"])
        response = _text(row, self.columns["response"])
        query = _text(row, self.columns["query"], optional=True)
        system = _text(row, self.columns["system"], optional=True)
        question = "\n".join(part for part in (prompt, query) if part)
        if not question and not response:
            raise UnusableRow("question and answer are empty")
        messages = [_message("system", system)] if system else []
        for old_question, old_answer in self._history(row):
            messages += [_message("user", old_question), _message("assistant", old_answer)]
        return [*messages, _message("user", question), _message("assistant", response)]

    def _history(self, row: Row) -> Iterable[tuple[str, str]]:
        column = self.columns["history"]
        history = _parsed(row, column)
        if history is None:
            return
        if not isinstance(history, list):
            raise Refused(f"{row.where}: {column} is {describe(history)}; expected a list of pairs")
        for turn in history:
            pair = turn if isinstance(turn, list) else None
            if pair is None or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise Refused(f"{row.where}: {column} holds {describe(turn)}; expected pairs of texts")
            yield pair[0], pair[1]


@dataclass(frozen=True)
class OpenAIHandler:
    """Rows whose ``messages`` are a list of objects with role and content."""

    columns: Mapping[str, str]

    def messages(self, row: Row) -> list[Message]:
        """The messages with plain text as content, behind the row's own system text if it has one."""
        column = self.columns["messages"]
        given = _parsed(row, column)
        if column not in row.values:
            raise Refused(f"{row.where}: {column} is missing; found {_names(row.values)}")
        if not isinstance(given, list):
            raise Refused(f"{row.where}: {column} is {describe(given)}; expected a list of messages")
        messages = [self._message(row, number, message) for number, message in enumerate(given, 1)]
        system = _text(row, self.columns["system"], optional=True)
        if system and not (messages and messages[0]["role"] == "system"):
            messages.insert(0, _message("system", system))
        if not messages:
            raise UnusableRow("there are no messages")
        return messages

    def _message(self, row: Row, number: int, message: Any) -> Message:
        where = f"{row.where}, message {number}"
        if not isinstance(message, dict) or "role" not in message:
            raise Refused(f"{where}: expected an object with role and content, found {describe(message)}")
        role = _ROLES.get(message["role"], message["role"]) if isinstance(message["role"], str) else None
        if role not in _KNOWN_ROLES:
            raise Refused(f"{where}: role is {describe(message['role'])}; expected {', '.join(_KNOWN_ROLES)}")
        # Parquet fills what other messages have with null: such keys are as good as absent.
        others = {key: value for key, value in message.items() if value is not None}
        return {**others, "role": role, "content": self._content(where, message)}

    def _content(self, where: str, message: dict[str, Any]) -> str:
        content = message.get("content")
        if isinstance(content, str):
            return content
        if content is None and message.get("tool_calls"):
            return ""
        if isinstance(content, list) and all(
            isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
        ):
            return "".join(part["text"] for part in content)
        found = describe(content) if "content" in message else "no content"
        raise Refused(f"{where}: expected text as content, found {found}")


@dataclass(frozen=True)
class PretrainHandler:
    """Rows with one or more columns of plain text."""

    keys: tuple[str, ...]
    columns: Mapping[str, str]

    def texts(self, row: Row) -> tuple[str, ...]:
        """The texts of the columns."""
        return tuple(_text(row, self.columns[key]) for key in self.keys)


@dataclass(frozen=True)
class AlpacaPretrainHandler:
    """Alpaca rows as plain text, with the headings of the ``alpaca`` template."""

    columns: Mapping[str, str]
    keys: tuple[str, ...] = ("text",)

    def texts(self, row: Row) -> tuple[str, ...]:
        """The conversation as one text."""
        template = prompt_template("alpaca")
        system, turns = template.default_system, []
        question = ""
        for message in AlpacaHandler(self.columns).messages(row):
            if message["role"] == "system":
                system = message["content"]
            elif message["role"] == "user":
                question = "".join(template.user).replace(CONTENT, message["content"], 1)
            else:
                turns.append(question + template.answer_header + message["content"])
        return (system + "".join(template.separator).join(turns),)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(row: Row, column: str, optional: bool = False) -> str:
    value = row.values.get(column)
    if value is None and optional:
        return ""
    if column not in row.values:
        raise Refused(f"{row.where}: {column} is missing; found {_names(row.values)}")
    if not isinstance(value, str):
        raise Refused(f"{row.where}: {column} is {describe(value)}; expected text")
    return value


def _parsed(row: Row, column: str) -> Any:
    """A column that is a list; in CSV files, JSON text of one."""
    value = row.values.get(column)
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise Refused(f"{row.where}: {column} is {describe(value)}; expected a list") from error


def _names(values: Mapping[str, Any]) -> str:
    return ", ".join(values) or "no columns"
