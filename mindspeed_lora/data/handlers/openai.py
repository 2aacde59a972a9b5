"""Rows whose ``messages`` are those of OpenAI, their content a text or a list of parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mindspeed_lora.data.conversation import REASONING, Message
from mindspeed_lora.data.handlers.fields import Columns, checked_text
from mindspeed_lora.data.handlers.tool_fields import call_message, checked_calls, conversation
from mindspeed_lora.data.readers import Row, describe
from mindspeed_lora.errors import Refused

OPENAI_COLUMNS: Columns = {"messages": "messages", "system": "system", "tools": "tools"}
_ROLES = {
    **{"developer": "system", "human": "user", "gpt": "assistant"},
    **{"function": "tool", "observation": "tool"},
}
_KNOWN_ROLES = ("system", "user", "assistant", "tool", "function_call")


@dataclass(frozen=True)
class OpenAIHandler:
    """Rows whose ``messages`` are a list of objects with role and content."""

    columns: Columns

    def messages(self, row: Row) -> list[Message]:
        """The messages with plain text as content, behind the row's own system text if it has one."""
        return conversation(row, self.columns, _message)


def _message(where: str, given: Any) -> Message:
    if not isinstance(given, dict) or "role" not in given:
        raise Refused(f"{where}: expected an object with role and content, found {describe(given)}")
    role = _ROLES.get(given["role"], given["role"]) if isinstance(given["role"], str) else None
    if role not in _KNOWN_ROLES:
        raise Refused(f"{where}: role is {describe(given['role'])}; expected {', '.join(_KNOWN_ROLES)}")
    # Parquet fills what other messages have with null: such keys are as good as absent.
    others = {key: value for key, value in given.items() if value is not None and key != "tools"}
    if "loss_weight" in others:
        others.setdefault("weight", others.pop("loss_weight"))
    if isinstance(given.get("content"), list):
        others = {**others, **_of_parts(where, given["content"])}
    content = _content(where, others)
    if role == "function_call":
        return {**others, **call_message(where, content)}
    if others.get("tool_calls"):
        others["tool_calls"] = checked_calls(where, others["tool_calls"])
    if REASONING in others:
        others[REASONING] = checked_text(f"{where}: {REASONING}", others[REASONING])
    return {**others, "role": role, "content": content}


def _content(where: str, given: dict[str, Any]) -> str:
    content = given.get("content")
    if content is None and given.get("tool_calls"):
        return ""
    if not isinstance(content, str):
        found = describe(content) if "content" in given else "no content"
        raise Refused(f"{where}: expected text as content, found {found}")
    return checked_text(f"{where}: content", content)


def _of_parts(where: str, parts: Sequence[Any]) -> dict[str, Any]:
    """Content, thoughts and calls of a message whose content is a list of parts: objects with a type, and what they
    hold under ``text``, or, in LLaMA-Factory's newer form, under ``value``."""
    texts: dict[str, str] = {"text": "", "reasoning": ""}
    calls = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        value = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if kind not in (*texts, "tool_call") or not isinstance(value, str):
            raise Refused(
                f"{where}: expected text as content, found {describe(part)} in a list; parts of the types text, "
                "reasoning and tool_call are read, and only text is trained here"
            )
        if kind == "tool_call":
            calls.append({"type": "function", "function": _call(where, value)})
        else:
            texts[kind] += value
    more: dict[str, Any] = {"content": texts["text"]}
    if texts["reasoning"]:
        more[REASONING] = texts["reasoning"]
    if calls:
        more["tool_calls"] = calls
    return more


def _call(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{where}: a tool_call is {describe(text)}; expected JSON") from error
