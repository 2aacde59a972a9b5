"""What a worker does with rows that have a chosen and a rejected answer: tokenise both, label the answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from mindspeed_lora.data.conversation import REASONING, WITHOUT_THOUGHT, Message, UnusableRow
from mindspeed_lora.data.encoding import TemplateEncoder
from mindspeed_lora.data.handlers import PairHandler
from mindspeed_lora.data.outcome import Outcome
from mindspeed_lora.data.readers import Row
from mindspeed_lora.data.row_work import InstructionWork


@dataclass(frozen=True, kw_only=True)
class _Given:
    """A handler that reads nothing: the conversation is in the row already."""

    def messages(self, row: Row) -> list[Message]:
        messages: list[Message] = row.values["messages"]
        return messages


GIVEN_CONVERSATIONS = _Given()


@dataclass(frozen=True, kw_only=True)
class PairWork:
    """Pairs become tokens and labels; each of the two is a conversation of which the last answer carries loss."""

    handler: PairHandler
    single: InstructionWork
    """Encodes and cuts one conversation; its handler is :data:`GIVEN_CONVERSATIONS`."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the data sets that are written."""
        return ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")

    def __call__(self, rows: Sequence[Row]) -> list[Outcome]:
        """One outcome a row, in order; a row of which one conversation is dropped is dropped."""
        return [self._outcome(row) for row in rows]

    def _outcome(self, row: Row) -> Outcome:
        try:
            pair = self.handler.pair(row)
        except UnusableRow as reason:
            return Outcome(reason=str(reason))
        both = [dataclasses.replace(row, values={"messages": self._prepared(one)}) for one in pair]
        chosen, rejected = self.single(both)
        dropped = chosen.reason or rejected.reason
        if dropped is not None:
            return Outcome(reason=dropped)
        return Outcome(
            documents=(
                *(chosen.documents[0], chosen.documents[2]),
                *(rejected.documents[0], rejected.documents[2]),
            ),
            num_loss_tokens=chosen.num_loss_tokens + rejected.num_loss_tokens,
            was_cut=chosen.was_cut or rejected.was_cut,
            num_tokens=len(chosen.documents[0]) + len(rejected.documents[0]),
        )

    def _prepared(self, messages: Sequence[Message]) -> list[Message]:
        """Earlier answers are part of the prompt, where thoughts are left out, empty ones too."""
        encoder = self.single.encoder
        if not isinstance(encoder, TemplateEncoder) or encoder.template.thought_words is None:
            return list(messages)
        template = encoder.template
        return [
            {
                **message,
                "content": template.without_thoughts(message["content"]),
                REASONING: None,
                WITHOUT_THOUGHT: True,
            }
            if message["role"] == "assistant" and number + 1 < len(messages)
            else message
            for number, message in enumerate(messages)
        ]
