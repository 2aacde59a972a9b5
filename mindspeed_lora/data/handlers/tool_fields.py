"""Tools and tool calls of rows: JSON of several shapes becomes the one that messages have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from mindspeed_lora.data.conversation import Message, UnusableRow
from mindspeed_lora.data.handlers.fields import Columns, list_of, message, names, text_of
from mindspeed_lora.data.readers import Row, describe
from mindspeed_lora.errors import Refused

_MEDIA = ("images", "videos", "audios")
_THOUGHT = re.compile(r"<think>.*</think>\s*", re.DOTALL)


def conversation(row: Row, columns: Columns, read: Callable[[str, Any], Message]) -> list[Message]:
    """The messages of a row that has a list of them, behind its own system text if it has one, with its tools.

    ``read`` takes where a message is and what is there.

    Raises:
        Refused: the list is missing or none, or tools are not a list of functions with names.
        UnusableRow: it is empty.
    """
    refuse_media(row)
    column = columns["messages"]
    given = list_of(row, column)
    if column not in row.values:
        raise Refused(f"{row.where}: {column} is missing; found {names(row.values)}")
    if not isinstance(given, list):
        raise Refused(f"{row.where}: {column} is {describe(given)}; expected a list of messages")
    messages = [read(f"{row.where}, message {number}", one) for number, one in enumerate(given, 1)]
    system = text_of(row, columns["system"], optional=True)
    if system and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, message("system", system))
    if not messages:
        raise UnusableRow("there are no messages")
    return with_tools(row, columns["tools"], messages)


def refuse_media(row: Row) -> None:
    """Refuse a row that goes with pictures, films or sound."""
    for column in _MEDIA:
        if row.values.get(column):
            raise Refused(
                f"{row.where}: {column} is {describe(row.values[column])}; only text is trained here, so leave such "
                "rows out"
            )


def with_tools(row: Row, column: str | None, messages: Sequence[Message]) -> list[Message]:
    """The messages, with the tools of the row in the system message.

    Raises:
        Refused: they are not a list of functions with names.
    """
    tools = list_of(row, column)
    if not tools:
        return list(messages)
    if not isinstance(tools, list):
        raise Refused(f"{row.where}: {column} is {describe(tools)}; expected a list of functions")
    for tool in tools:
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise Refused(f"{row.where}: {column} holds {describe(tool)}; expected a function with a name")
        parameters = inner.get("parameters")
        if parameters is not None and not _is_schema(parameters):
            raise Refused(
                f"{row.where}: {column}: the parameters of {inner['name']} are {describe(parameters)}; "
                "expected an object with properties, each an object"
            )
    rest = list(messages)
    system = rest.pop(0) if rest and rest[0]["role"] == "system" else message("system", "")
    return [{**system, "tools": tools}, *rest]


def _is_schema(parameters: Any) -> bool:
    properties = parameters.get("properties", {}) if isinstance(parameters, dict) else None
    return isinstance(properties, dict) and all(isinstance(about, dict) for about in properties.values())


def call_message(where: str, text: str) -> Message:
    """ShareGPT's function_call: JSON of ``{"name": …, "arguments": …}`` or a list of them, perhaps behind thoughts."""
    found = _THOUGHT.search(text)
    thought = found.group(0) if found else ""
    try:
        calls = json.loads(text.replace(thought, "", 1) if thought else text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise Refused(f"{where}: a function call is {describe(text)}; expected JSON") from error
    wrapped = [
        {"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])
    ]
    return message("assistant", thought, tool_calls=checked_calls(where, wrapped))


def checked_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """``tool_calls`` of a message, each with a function that has a name and arguments, no longer as JSON text."""
    if not isinstance(calls, list):
        raise Refused(f"{where}: tool_calls is {describe(calls)}; expected a list")
    return [_checked_call(where, call) for call in calls]


def _checked_call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused(f"{where}: tool_calls holds {describe(call)}; expected a function with a name")
    given = function.get("arguments")
    arguments = {} if given is None or given == "" else given
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (json.JSONDecodeError, RecursionError) as error:
            raise Refused(
                f"{where}: the arguments of {function['name']} are {describe(given)}; expected JSON"
            ) from error
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}
