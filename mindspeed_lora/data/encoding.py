"""Conversations and texts become token rows with labels.

A row is encoded in two steps, so that the tokenizer sees many texts at once: first all rows of a chunk are
rendered to text, then their tokens are put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mindspeed_lora.data.conversation import Message, UnusableRow, to_turns
from mindspeed_lora.data.joints import find_joints
from mindspeed_lora.data.prompt_template import PROMPT, Piece, PromptTemplate, pieces, special_tokens
from mindspeed_lora.data.sample import IGNORE_INDEX
from mindspeed_lora.data.tokenizer import encode_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOSS_ON_CHOICES = ("assistant", "last-assistant", "all")


@dataclass(frozen=True)
class TokenRow:
    """One row, before it is cut to the sequence length."""

    input_ids: np.ndarray[Any, Any]
    """int32 ``[n]``."""
    labels: np.ndarray[Any, Any]
    """int32 ``[n]``, unshifted."""


class ConversationEncoder(Protocol):
    """Turns conversations into rows."""

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[TokenRow | UnusableRow]:
        """One result a conversation, in order: the row, or why there is none."""
        ...


def label(input_ids: np.ndarray[Any, Any], answers: np.ndarray[Any, Any], loss_on: str) -> TokenRow:
    """The row whose labels are the tokens that ``loss_on`` names.

    ``answers`` ``[n]`` holds the number of the answer that each token belongs to, or PROMPT.
    """
    if loss_on == "all":
        return TokenRow(input_ids, input_ids.copy())
    trained = answers != PROMPT
    if loss_on == "last-assistant" and len(answers):
        trained &= answers == answers.max()
    return TokenRow(input_ids, np.where(trained, input_ids, np.int32(IGNORE_INDEX)))


def with_end(row: TokenRow, end_token_id: int) -> TokenRow:
    """The row with the end token behind it, trained, unless it ends with that token already."""
    if len(row.input_ids) and row.input_ids[-1] == end_token_id:
        return row
    end = np.array([end_token_id], dtype=np.int32)
    return TokenRow(np.concatenate([row.input_ids, end]), np.concatenate([row.labels, end]))


class TemplateEncoder:
    """Encodes by a prompt template: the pieces of a prompt together, each answer on its own."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, loss_on: str = "assistant"
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.loss_on = loss_on
        self._special = special_tokens(template, tokenizer)
        self._joints = find_joints(tokenizer)

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[TokenRow | UnusableRow]:
        """One result a conversation, in order: the row, or why there is none."""
        rendered = [self._render(conversation) for conversation in conversations]
        # Headers and system texts come back in every row: each text is tokenised once a chunk.
        texts = {
            text: 0
            for row in rendered
            if not isinstance(row, UnusableRow)
            for text, _ in row
            if isinstance(text, str)
        }
        token_ids = dict(zip(texts, encode_batch(self.tokenizer, list(texts)), strict=True))
        return [row if isinstance(row, UnusableRow) else self._assemble(row, token_ids) for row in rendered]

    def _render(self, conversation: Sequence[Message]) -> list[Piece] | UnusableRow:
        try:
            turns = to_turns(conversation)
        except UnusableRow as reason:
            return reason
        joined: list[Piece] = []
        for content, answer in pieces(self.template, turns, self._special):
            before = joined[-1][0] if joined and joined[-1][1] == answer == PROMPT else None
            if isinstance(content, str) and isinstance(before, str):
                joined[-1] = self._joints.join(before, content), PROMPT
            else:
                joined.append((content, answer))
        return joined

    def _assemble(self, row: list[Piece], token_ids: dict[str, list[int]]) -> TokenRow:
        input_ids: list[int] = []
        answers: list[int] = []
        for content, answer in row:
            ids = [content] if isinstance(content, int) else token_ids[content]
            input_ids += ids
            answers += [answer] * len(ids)
        owners = np.array(answers, dtype=np.int32)
        labelled = label(np.array(input_ids, dtype=np.int32), owners, self.loss_on)
        if self.template.efficient_eos and self._special.end is not None and self.loss_on != "all":
            self._end_answers(labelled.labels, owners, self._special.end)
        return labelled

    def _end_answers(self, labels: np.ndarray[Any, Any], owners: np.ndarray[Any, Any], end: int) -> None:
        """Where a question follows a trained answer, the end token is what is to be predicted (``efficient_eos``)."""
        starts = np.flatnonzero((owners[1:] == PROMPT) & (owners[:-1] != PROMPT)) + 1
        labels[starts[labels[starts - 1] != IGNORE_INDEX]] = end
