"""Rows whose ``messages`` are those of OpenAI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mindspeed_lora.data.conversation import Message
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
    content = _content(where, given)
    if role == "function_call":
        return {**others, **call_message(where, content)}
    if others.get("tool_calls"):
        others["tool_calls"] = checked_calls(where, others["tool_calls"])
    return {**others, "role": role, "content": content}


def _content(where: str, given: dict[str, Any]) -> str:
    content = given.get("content")
    if content is None and given.get("tool_calls"):
        return ""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        found = describe(content) if "content" in given else "no content"
        raise Refused(f"{where}: expected text as content, found {found}")
    return checked_text(f"{where}: content", content)
