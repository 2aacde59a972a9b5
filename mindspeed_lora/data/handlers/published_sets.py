"""Handlers of single published data sets: Belle, MOSS, Leetcode, Stack Overflow.

MindSpeed-LLM writes these in a fixed Alpaca-like text with loss on the last answer. Here they are conversations
like all others: any prompt template and ``--loss-on`` apply, and ``alpaca`` is the default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mindspeed_lora.data.conversation import Message, UnusableRow
from mindspeed_lora.data.handlers.fields import Columns, checked_text, list_of, message, names, text_of
from mindspeed_lora.data.readers import Row, describe
from mindspeed_lora.errors import Refused

_HUMAN, _ASSISTANT = "Human:", "Assistant:"
_MOSS_MARKS = ("<eoh>", "<eom>", "<|Human|>:", "<|MOSS|>:")


@dataclass(frozen=True)
class BelleHandler:
    """``instruction`` holds earlier turns and the question, as ``Human: … Assistant: …``; ``output`` the answer."""

    columns: Columns

    def messages(self, row: Row) -> list[Message]:
        """The turns of the instruction, and the answer."""
        instruction = text_of(row, self.columns["prompt"])
        response = text_of(row, self.columns["response"]).strip()
        messages: list[Message] = []
        for number, turn in enumerate(instruction.split(_HUMAN)):
            if number == 0 and not turn.strip():
                continue
            question, *answers = turn.split(_ASSISTANT)
            if number == 0 and answers:
                raise UnusableRow(f"{_ASSISTANT} stands before the first {_HUMAN}")
            messages.append(message("user", question.strip()))
            messages += [message("assistant", answer.strip()) for answer in answers]
        if messages and messages[-1] == message("assistant", ""):
            messages.pop()
        return [*messages, message("assistant", response)]


@dataclass(frozen=True)
class MossHandler:
    """``chat`` holds turns by name, each with ``Human`` and ``MOSS``."""

    columns: Columns

    def messages(self, row: Row) -> list[Message]:
        """The turns in their order, without MOSS's marks."""
        column = self.columns["chat"]
        chat = list_of(row, column)
        if column not in row.values:
            raise Refused(f"{row.where}: {column} is missing; found {names(row.values)}")
        turns = list(chat.values()) if isinstance(chat, dict) else chat
        if not isinstance(turns, list):
            raise Refused(f"{row.where}: {column} is {describe(chat)}; expected turns by name")
        messages: list[Message] = []
        for turn in turns:
            if turn:
                messages += [message("user", self._said(row, turn, "Human"))]
                messages += [message("assistant", self._said(row, turn, "MOSS"))]
        if not messages:
            raise UnusableRow("there are no messages")
        return messages

    def _said(self, row: Row, turn: Any, who: str) -> str:
        if not isinstance(turn, dict) or who not in turn:
            raise Refused(f"{row.where}: a turn is {describe(turn)}; expected an object with Human and MOSS")
        text = checked_text(f"{row.where}: {who}", turn[who])
        for mark in _MOSS_MARKS:
            text = text.replace(mark, "")
        return text.strip()


@dataclass(frozen=True)
class LeetcodeHandler:
    """The problem stands before the first code block of ``code_with_problem``."""

    columns: Columns

    def messages(self, row: Row) -> list[Message]:
        """The problem; code and explanation."""
        problem = text_of(row, self.columns["prompt"]).split("```", maxsplit=1)[0].strip()
        code = text_of(row, self.columns["query"])
        explanation = text_of(row, self.columns["response"])
        return [message("user", problem), message("assistant", f"{code}\n{explanation}")]


@dataclass(frozen=True)
class StackOverflowHandler:
    """Questions on Python with their answers, as plain text."""

    columns: Columns
    keys: tuple[str, ...] = ("text",)

    def texts(self, row: Row) -> tuple[str, ...]:
        """Title, question and answer as one text."""
        title, question, answer = (text_of(row, self.columns[key]) for key in ("title", "question", "answer"))
        return (f"In python, {title}\n### Question:\n{question}\n### Response:\n{answer}\n",)


BELLE_COLUMNS: Columns = {"prompt": "instruction", "response": "output"}
MOSS_COLUMNS: Columns = {"chat": "chat"}
LEETCODE_COLUMNS: Columns = {
    "prompt": "code_with_problem",
    "query": "code_only",
    "response": "explanation_only",
}
STACK_OVERFLOW_COLUMNS: Columns = {"title": "title", "question": "question_body", "answer": "answer_body"}
