"""A conversation as rows give it, and as prompt templates take it.

Messages are those of OpenAI: the roles are system, user, assistant and tool (a tool's result). What an assistant
calls stands in ``tool_calls``; the tools that it may call stand in ``tools`` of the system message, which is
there, with empty content, where a row has tools and no system text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]
"""``role`` and ``content`` (text) as OpenAI has them; other keys are for chat templates that know them."""
Tool = Mapping[str, Any]
"""The JSON description of a function: ``name``, ``description``, ``parameters``; perhaps inside of ``function``."""


THOUGHT_WORDS = ("<think>", "</think>")
"""What most models put around their thoughts."""
THOUGHT_FRAME = (f"{THOUGHT_WORDS[0]}\n", f"\n{THOUGHT_WORDS[1]}\n\n")
"""What stands before thoughts that a message tells apart, and behind them, where no template says otherwise."""
REASONING = "reasoning_content"
"""The key of a message under which its thoughts stand where they are told apart from the answer."""

WITHOUT_THOUGHT = "without_thought"
"""The key of a message that gets no empty thought."""


class UnusableRow(Exception):
    """The row is well formed, but there is nothing to train in it; the message is why it is dropped."""


@dataclass(frozen=True)
class Call:
    """A function that an assistant calls."""

    name: str
    arguments: str
    """JSON text."""


@dataclass(frozen=True)
class Turns:
    """Messages brought to the form that prompt templates have slots for."""

    system: str
    """Empty where the row has none."""
    questions: tuple[str, ...]
    """What stands before each answer; empty where those are results of tools."""
    answers: tuple[str, ...]
    tools: tuple[Tool, ...] = ()
    results: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Number of a question → the results of tools that stand in its place."""
    calls: Mapping[int, tuple[Call, ...]] = field(default_factory=dict)
    """Number of an answer → what it calls behind its text."""
    without_thought: frozenset[int] = frozenset()
    """Numbers of answers that get no empty thought."""


def split_tools(messages: Sequence[Message]) -> tuple[list[Message], tuple[Tool, ...]]:
    """The messages without ``tools``, and these; a system message that had nothing else is left out."""
    if not messages or "tools" not in messages[0]:
        return list(messages), ()
    first = {key: value for key, value in messages[0].items() if key != "tools"}
    rest = list(messages[1:])
    keep = first["role"] != "system" or first["content"]
    return [first, *rest] if keep else rest, tuple(messages[0]["tools"])


def calls_of(message: Message) -> tuple[Call, ...]:
    """What a message calls; arguments are JSON text in one form, however they were given."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}")
        calls.append(Call(function["name"], json.dumps(arguments, ensure_ascii=False)))
    return tuple(calls)


def with_thoughts(message: Message, frame: tuple[str, str] = THOUGHT_FRAME) -> str:
    """The text of a message behind its thoughts, in their frame, where it has them and does not begin with any."""
    text: str = message["content"]
    thoughts = message.get(REASONING)
    own = text.lstrip().startswith(frame[0].strip())
    if not isinstance(thoughts, str) or not thoughts or message["role"] != "assistant" or own:
        return text
    return f"{frame[0]}{thoughts}{frame[1]}{text}"


def to_turns(messages: Sequence[Message], frame: tuple[str, str] = THOUGHT_FRAME) -> Turns:
    """Check that an optional system message is followed by questions and answers in turn.

    ``frame`` stands before and behind thoughts that a message tells apart.

    A question is a message of the user, or one or more results of tools. Answers are numbered in the order of the
    assistant's messages.

    Raises:
        UnusableRow: they do not alternate, or other roles take part.
    """
    system = ""
    rest, tools = split_tools(messages)
    if rest and rest[0]["role"] == "system":
        system = rest.pop(0)["content"]
    questions: list[str] = []
    answers: list[str] = []
    results: dict[int, tuple[str, ...]] = {}
    calls: dict[int, tuple[Call, ...]] = {}
    without_thought: set[int] = set()
    for message in rest:
        role, text = message["role"], message["content"]
        answered = len(questions) == len(answers)
        if role not in ("system", "user", "assistant", "tool"):
            raise UnusableRow(f"role {role} has no place in the prompt template")
        if role == "tool" and not answered and len(answers) in results:
            results[len(answers)] += (text,)
        elif role == "system" or (role == "assistant") == answered:
            raise UnusableRow("user and assistant do not alternate")
        elif role == "assistant":
            if message.get("tool_calls"):
                calls[len(answers)] = calls_of(message)
            if message.get(WITHOUT_THOUGHT):
                without_thought.add(len(answers))
            answers.append(with_thoughts(message, frame))
        else:
            if role == "tool":
                results[len(questions)] = (text,)
            questions.append("" if role == "tool" else text)
    if not questions or len(questions) != len(answers):
        raise UnusableRow("the last message is not the assistant's")
    return Turns(system, tuple(questions), tuple(answers), tools, results, calls, frozenset(without_thought))
