"""A conversation as rows give it, and as prompt templates take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
"""``role`` and ``content`` (text) as OpenAI has them; other keys are for chat templates that know them."""


class UnusableRow(Exception):
    """The row is well formed, but there is nothing to train in it; the message is why it is dropped."""


@dataclass(frozen=True)
class Turns:
    """Messages brought to the form that prompt templates have slots for."""

    system: str
    """Empty where the row has none."""
    questions: tuple[str, ...]
    answers: tuple[str, ...]


def to_turns(messages: Sequence[Message]) -> Turns:
    """Check that an optional system message is followed by user and assistant in turn.

    Raises:
        UnusableRow: they do not alternate, or other roles take part.
    """
    system = ""
    rest = list(messages)
    if rest and rest[0]["role"] == "system":
        system = rest.pop(0)["content"]
    for position, message in enumerate(rest):
        role = message["role"]
        if role not in ("system", "user", "assistant"):
            raise UnusableRow(f"role {role} has no place in the prompt template")
        if role != ("user", "assistant")[position % 2]:
            raise UnusableRow("user and assistant do not alternate")
        if message.get("tool_calls"):
            raise UnusableRow("tool calls have no place in the prompt template")
    if not rest or len(rest) % 2:
        raise UnusableRow("the last message is not the assistant's")
    texts = [message["content"] for message in rest]
    return Turns(system, tuple(texts[0::2]), tuple(texts[1::2]))
