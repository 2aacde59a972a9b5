"""ShareGPT rows: a list of messages whose keys and roles have names that ``--map-keys`` may change (``tags``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindspeed_lora.data.conversation import Message
from mindspeed_lora.data.handlers.alpaca import alpaca_text
from mindspeed_lora.data.handlers.fields import (
    Columns,
    checked_text,
    columns,
    message,
    parse_map,
    text_of,
)
from mindspeed_lora.data.handlers.tool_fields import call_message, conversation
from mindspeed_lora.data.readers import Row, describe
from mindspeed_lora.errors import Refused

SHAREGPT_COLUMNS: Columns = {
    "messages": "conversations",
    "system": "system",
    "tools": "tools",
    "chosen": "chosen",
    "rejected": "rejected",
}
SHAREGPT_TAGS: Mapping[str, str] = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "call",
    "system_tag": "system",
}


@dataclass(frozen=True)
class ShareGptHandler:
    """Rows whose ``conversations`` are a list of objects with ``from`` and ``value``."""

    columns: Columns
    tags: Mapping[str, str]

    @classmethod
    def of(cls, map_keys: str | Mapping[str, Any] | None) -> ShareGptHandler:
        """With the columns and tags of ``--map-keys``; tags that it does not name keep their defaults."""
        mapped = parse_map(map_keys)
        tags = mapped.pop("tags", None) or {}
        if "kto_tag" in mapped:
            raise Refused("--map-keys: kto_tag is for KTO training, which is not supported; leave it out")
        if not isinstance(tags, dict):
            raise Refused(f"--map-keys: tags is {describe(tags)}; expected an object")
        for tag, name in tags.items():
            if tag not in SHAREGPT_TAGS:
                raise Refused(f"--map-keys: unknown tag {tag}; expected some of {', '.join(SHAREGPT_TAGS)}")
            if not isinstance(name, str) or not name:
                raise Refused(f"--map-keys: tag {tag} is {describe(name)}; expected a name")
        known = {**SHAREGPT_COLUMNS, "tags": None}
        for key in mapped:
            if key not in known:
                raise Refused(f"--map-keys: unknown key {key}; expected some of {', '.join(known)}")
        return cls(columns(SHAREGPT_COLUMNS, mapped), {**SHAREGPT_TAGS, **tags})

    def messages(self, row: Row) -> list[Message]:
        """The messages, behind the row's own system text if it has one, with its tools."""
        return conversation(row, self.columns, self.message)

    def message(self, where: str, given: Any) -> Message:
        """One message in OpenAI's form; keys that are not tags stay."""
        role_tag, content_tag = self.tags["role_tag"], self.tags["content_tag"]
        if not isinstance(given, dict) or role_tag not in given or content_tag not in given:
            raise Refused(
                f"{where}: expected an object with {role_tag} and {content_tag}, found {describe(given)}"
            )
        by_name = {self.tags[tag]: role for tag, role in _ROLES.items()}
        role = by_name.get(given[role_tag]) if isinstance(given[role_tag], str) else None
        if role is None:
            raise Refused(
                f"{where}: {role_tag} is {describe(given[role_tag])}; expected {', '.join(by_name)}"
            )
        content = checked_text(f"{where}: {content_tag}", given[content_tag])
        others = {
            key: value
            for key, value in given.items()
            if key not in (role_tag, content_tag, "role", "content") and value is not None
        }
        if role == "call":
            return {**others, **call_message(where, content)}
        return {**others, **message(role, content)}


@dataclass(frozen=True)
class ShareGptPairHandler:
    """ShareGPT rows that end with the user, and two answers: ``chosen`` and ``rejected``."""

    inner: ShareGptHandler

    def pair(self, row: Row) -> tuple[list[Message], list[Message]]:
        """The conversation with the chosen answer, and with the rejected one."""
        prompt = self.inner.messages(row)
        chosen, rejected = (self._answer(row, self.inner.columns[key]) for key in ("chosen", "rejected"))
        return [*prompt, chosen], [*prompt, rejected]

    def _answer(self, row: Row, column: str | None) -> Message:
        value = row.values.get(column) if column is not None else None
        if isinstance(value, dict):
            answer = self.inner.message(f"{row.where}: {column}", value)
        else:
            answer = message("assistant", text_of(row, column))
        if answer["role"] != "assistant":
            raise Refused(f"{row.where}: {column} is a message of {answer['role']}; expected the assistant's")
        return answer


@dataclass(frozen=True)
class ShareGptPretrainHandler:
    """ShareGPT rows as plain text, with the headings of the ``alpaca`` template."""

    inner: ShareGptHandler
    keys: tuple[str, ...] = ("text",)

    def texts(self, row: Row) -> tuple[str, ...]:
        """The conversation as one text."""
        return (alpaca_text(self.inner.messages(row)),)
