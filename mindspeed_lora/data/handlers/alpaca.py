"""Alpaca rows: instruction, input and output; perhaps earlier turns, a system text, or two answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mindspeed_lora.data.conversation import Message, UnusableRow
from mindspeed_lora.data.handlers.fields import Columns, checked_text, list_of, message, text_of
from mindspeed_lora.data.handlers.tool_fields import refuse_media, with_tools
from mindspeed_lora.data.prompt_template import CONTENT
from mindspeed_lora.data.readers import Row, describe
from mindspeed_lora.data.template_files import prompt_template
from mindspeed_lora.errors import Refused

ALPACA_COLUMNS: Columns = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "tools": None,
    "chosen": "chosen",
    "rejected": "rejected",
}


@dataclass(frozen=True)
class AlpacaHandler:
    """Rows with instruction, input and output, and perhaps a history of earlier turns and a system text."""

    columns: Columns

    def messages(self, row: Row) -> list[Message]:
        """System text, earlier turns, then instruction and input (joined by a line feed) and output."""
        prompt = self.prompt(row)
        response = _answer(row, self.columns["response"])
        if not prompt[-1]["content"] and not response:
            raise UnusableRow("question and answer are empty")
        return [*prompt, message("assistant", response)]

    def prompt(self, row: Row) -> list[Message]:
        """The messages before the answer."""
        refuse_media(row)
        query = text_of(row, self.columns["query"], optional=True)
        instruction = self._instruction(row, bool(query))
        system = text_of(row, self.columns["system"], optional=True)
        question = "\n".join(part for part in (instruction, query) if part)
        messages = [message("system", system)] if system else []
        for old_question, old_answer in self._history(row):
            messages += [message("user", old_question), message("assistant", old_answer)]
        return with_tools(row, self.columns["tools"], [*messages, message("user", question)])

    def _instruction(self, row: Row, has_query: bool) -> str:
        """What may be left empty where the query says everything."""
        column = self.columns["prompt"]
        return text_of(row, column, optional=column is None or (has_query and column in row.values))

    def _history(self, row: Row) -> Iterable[tuple[str, str]]:
        column = self.columns["history"]
        history = list_of(row, column)
        if history is None:
            return
        if not isinstance(history, list):
            raise Refused(f"{row.where}: {column} is {describe(history)}; expected a list of pairs")
        for turn in history:
            pair = turn if isinstance(turn, list) else None
            if pair is None or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise Refused(f"{row.where}: {column} holds {describe(turn)}; expected pairs of texts")
            yield (
                checked_text(f"{row.where}: {column}", pair[0]),
                checked_text(f"{row.where}: {column}", pair[1]),
            )


def _answer(row: Row, column: str | None) -> str:
    """A text, or a list of one."""
    value = row.values.get(column) if column is not None else None
    if isinstance(value, list) and len(value) == 1:
        return checked_text(f"{row.where}: {column}", value[0])
    return text_of(row, column)


@dataclass(frozen=True)
class AlpacaPairHandler:
    """Alpaca rows with a chosen and a rejected answer."""

    columns: Columns

    def pair(self, row: Row) -> tuple[list[Message], list[Message]]:
        """The conversation with the chosen answer, and with the rejected one."""
        prompt = AlpacaHandler(self.columns).prompt(row)
        chosen, rejected = self.columns["chosen"], self.columns["rejected"]
        # One column for both holds the two of them, in this order.
        second = 1 if chosen == rejected else 0
        return (
            [*prompt, message("assistant", _one_of(row, chosen, 0))],
            [*prompt, message("assistant", _one_of(row, rejected, second))],
        )


def _one_of(row: Row, column: str | None, number: int) -> str:
    value = row.values.get(column) if column is not None else None
    if not isinstance(value, list):
        if number:
            raise Refused(f"{row.where}: {column} is {describe(value)}; expected a list of two texts")
        return text_of(row, column)
    if len(value) <= number:
        raise Refused(f"{row.where}: {column} has {len(value)} texts; expected at least {number + 1}")
    return checked_text(f"{row.where}: {column}", value[number])


@dataclass(frozen=True)
class AlpacaPretrainHandler:
    """Alpaca rows as plain text, with the headings of the ``alpaca`` template."""

    columns: Columns
    keys: tuple[str, ...] = ("text",)

    def texts(self, row: Row) -> tuple[str, ...]:
        """The conversation as one text."""
        return (alpaca_text(AlpacaHandler(self.columns).messages(row)),)


def alpaca_text(messages: Iterable[Message]) -> str:
    """A conversation as one text, by the ``alpaca`` template."""
    template = prompt_template("alpaca")
    system, turns = template.default_system, []
    question = ""
    for given in messages:
        if given["role"] == "system":
            system = given["content"] or system
        elif given["role"] == "user":
            question = "".join(template.user).replace(CONTENT, given["content"], 1)
        elif given["role"] == "assistant" and not given.get("tool_calls"):
            turns.append(question + template.answer_header + given["content"])
            question = ""
        else:
            raise UnusableRow("tools have no place in plain text")
    return system + "".join(template.separator).join(turns)
