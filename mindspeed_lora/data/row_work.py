"""What a worker does with a chunk of rows: read their columns, tokenise, label, cut to length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mindspeed_lora.data.conversation import Message, UnusableRow
from mindspeed_lora.data.encoding import ConversationEncoder, TokenRow, with_end
from mindspeed_lora.data.handlers import InstructionHandler, TextHandler
from mindspeed_lora.data.loss_weights import row_weight
from mindspeed_lora.data.outcome import Outcome
from mindspeed_lora.data.overlong import kept_positions
from mindspeed_lora.data.readers import Row
from mindspeed_lora.data.sample import number_trained
from mindspeed_lora.data.tokenizer import encode_batch
from mindspeed_lora.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class InstructionWork:
    """Conversations become tokens and labels."""

    handler: InstructionHandler
    encoder: ConversationEncoder
    end_token_id: int | None = None
    """Appended to each row when given."""
    seq_length: int | None = None
    overlong: str = "truncate"

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the data sets that are written."""
        return ("input_ids", "attention_mask", "labels")

    def __call__(self, rows: Sequence[Row]) -> list[Outcome]:
        """One outcome a row, in order."""
        conversations = [self._messages(row) for row in rows]
        usable = [
            (row, conversation)
            for row, conversation in zip(rows, conversations, strict=True)
            if not isinstance(conversation, UnusableRow)
        ]
        encoded = iter(self._encode(usable))
        results = (
            conversation if isinstance(conversation, UnusableRow) else next(encoded)
            for conversation in conversations
        )
        return [
            self._outcome(result, row_weight(row.values, row.where))
            for row, result in zip(rows, results, strict=True)
        ]

    def _messages(self, row: Row) -> list[Message] | UnusableRow:
        try:
            return self.handler.messages(row)
        except UnusableRow as reason:
            return reason

    def _encode(self, usable: Sequence[tuple[Row, list[Message]]]) -> list[TokenRow | UnusableRow]:
        try:
            return self.encoder.encode([conversation for _, conversation in usable])
        except Refused:
            # Again one by one, to name the row.
            for row, conversation in usable:
                try:
                    self.encoder.encode([conversation])
                except Refused as error:
                    raise Refused(f"{row.where}: {error}") from error
            raise

    def _outcome(self, row: TokenRow | UnusableRow, weight: float) -> Outcome:
        if isinstance(row, UnusableRow):
            return Outcome(reason=str(row))
        if self.end_token_id is not None:
            row = with_end(row, self.end_token_id)
        row = row.weighted(weight)
        trained = number_trained(row.labels)
        if not trained:
            return Outcome(reason="no token carries loss")
        was_cut = self.seq_length is not None and len(row.input_ids) > self.seq_length
        if self.seq_length is not None and was_cut:
            kept = kept_positions(row.labels, self.seq_length, self.overlong)
            if kept is None:
                left = "" if self.overlong == "drop" else ", and without loss when cut"
                return Outcome(reason=f"longer than --seq-length{left}")
            row = row.at(kept)
            trained = number_trained(row.labels)
        return Outcome(
            documents=(row.input_ids, np.ones_like(row.input_ids), row.labels),
            num_loss_tokens=trained,
            was_cut=was_cut,
            weights=row.weights,
        )


@dataclass(frozen=True, kw_only=True)
class TextWork:
    """Texts become tokens, with the special tokens that the tokenizer puts around a text; an empty one becomes none."""

    handler: TextHandler
    tokenizer: PreTrainedTokenizerBase
    end_token_id: int | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the data sets that are written."""
        return self.handler.keys

    def __call__(self, rows: Sequence[Row]) -> list[Outcome]:
        """One outcome a row, in order."""
        texts = [self._texts(row) for row in rows]
        flat = [text for row in texts if not isinstance(row, UnusableRow) for text in row if text]
        token_ids = iter(encode_batch(self.tokenizer, flat, add_special_tokens=True))
        return [
            Outcome(reason=str(row))
            if isinstance(row, UnusableRow)
            else self._outcome([next(token_ids) if text else [] for text in row])
            for row in texts
        ]

    def _texts(self, row: Row) -> tuple[str, ...] | UnusableRow:
        try:
            texts = self.handler.texts(row)
        except UnusableRow as reason:
            return reason
        return texts if any(texts) else UnusableRow("the text is empty")

    def _outcome(self, token_ids: Sequence[list[int]]) -> Outcome:
        documents = []
        for ids in token_ids:
            tokens = np.array(ids, dtype=np.int32)
            if self.end_token_id is not None and ids:
                tokens = with_end(TokenRow(tokens, tokens), self.end_token_id).input_ids
            documents.append(tokens)
        total = sum(len(tokens) for tokens in documents)
        return Outcome(tuple(documents), num_loss_tokens=total, num_tokens=total)


class Work(Protocol):
    """What is done with the rows of a data set."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the data sets that are written."""
        ...

    def __call__(self, rows: Sequence[Row]) -> list[Outcome]:
        """One outcome a row, in order.

        Raises:
            Refused: a row is broken.
        """
        ...
