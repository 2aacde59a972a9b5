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
from mindspeed_lora.data.loss_weights import message_weights, token_weights
from mindspeed_lora.data.prompt_template import PROMPT, Piece, PromptTemplate, pieces, special_tokens
from mindspeed_lora.data.sample import IGNORE_INDEX
from mindspeed_lora.data.tokenizer import encode_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenRow:
    """One row, before it is cut to the sequence length."""

    input_ids: np.ndarray[Any, Any]
    """int32 ``[n]``."""
    labels: np.ndarray[Any, Any]
    """int32 ``[n]``, unshifted."""
    weights: np.ndarray[Any, Any] | None = None
    """float32 ``[n]``: the weights of the labels, 0 among them; None: all are 1."""

    def at(self, positions: np.ndarray[Any, Any]) -> TokenRow:
        """Only these positions of the row."""
        weights = None if self.weights is None else self.weights[positions]
        return TokenRow(self.input_ids[positions], self.labels[positions], weights)

    def weighted(self, weight: float) -> TokenRow:
        """The row with all weights times ``weight``, and only those that are needed: a label of weight 0 is −100."""
        if self.weights is None and weight == 1:
            return self
        ones = np.ones(len(self.labels), dtype=np.float32)
        weights = (ones if self.weights is None else self.weights) * np.float32(weight)
        labels = np.where(weights == 0, np.int32(IGNORE_INDEX), self.labels)
        needed = (weights[labels != IGNORE_INDEX] != 1).any()
        return TokenRow(self.input_ids, labels, weights if needed else None)


class ConversationEncoder(Protocol):
    """Turns conversations into rows."""

    tokenizer: PreTrainedTokenizerBase

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[TokenRow | UnusableRow]:
        """One result a conversation, in order: the row, or why there is none."""
        ...


def label(
    input_ids: np.ndarray[Any, Any],
    answers: np.ndarray[Any, Any],
    loss_on: str,
    weights: Sequence[float] | None = None,
) -> TokenRow:
    """The row whose labels are the tokens that ``loss_on`` names.

    ``answers`` ``[n]`` holds the number of the answer that each token belongs to, or PROMPT; ``weights`` are those
    of the answers, None: all are 1.
    """
    of_tokens = None if weights is None else token_weights(answers, weights, loss_on)
    if loss_on == "all":
        return TokenRow(input_ids, input_ids.copy(), of_tokens)
    trained = answers != PROMPT
    if loss_on == "last-assistant" and len(answers):
        trained &= answers == answers.max()
    return TokenRow(input_ids, np.where(trained, input_ids, np.int32(IGNORE_INDEX)), of_tokens)


def with_end(row: TokenRow, end_token_id: int) -> TokenRow:
    """The row with the end token behind it, trained with the last token's weight, unless it ends with it already."""
    if len(row.input_ids) and row.input_ids[-1] == end_token_id:
        return row
    end = np.array([end_token_id], dtype=np.int32)
    weights = None if row.weights is None else np.concatenate([row.weights, row.weights[-1:]])
    return TokenRow(np.concatenate([row.input_ids, end]), np.concatenate([row.labels, end]), weights)


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
        weights = [message_weights(conversation, self.loss_on) for conversation in conversations]
        return [
            row if isinstance(row, UnusableRow) else self._assemble(row, token_ids, own)
            for row, own in zip(rendered, weights, strict=True)
        ]

    def _render(self, conversation: Sequence[Message]) -> list[Piece] | UnusableRow:
        try:
            turns = to_turns(conversation, self.template.thought_frame)
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

    def _assemble(
        self, row: list[Piece], token_ids: dict[str, list[int]], weights: Sequence[float] | None
    ) -> TokenRow:
        input_ids: list[int] = []
        lengths: list[int] = []
        for content, _ in row:
            ids = [content] if isinstance(content, int) else token_ids[content]
            input_ids += ids
            lengths.append(len(ids))
        owners = np.repeat(np.array([answer for _, answer in row], dtype=np.int32), lengths)
        labelled = label(np.array(input_ids, dtype=np.int32), owners, self.loss_on, weights)
        if self.template.efficient_eos and self._special.end is not None and self.loss_on != "all":
            self._end_answers(labelled.labels, owners, self._special.end)
        return labelled

    def _end_answers(self, labels: np.ndarray[Any, Any], owners: np.ndarray[Any, Any], end: int) -> None:
        """Where a question follows a trained answer, the end token is what is to be predicted (``efficient_eos``)."""
        starts = np.flatnonzero((owners[1:] == PROMPT) & (owners[:-1] != PROMPT)) + 1
        labels[starts[labels[starts - 1] != IGNORE_INDEX]] = end
