"""Encoding by the tokenizer's own chat template, and finding out which of its text the assistant writes.

Chat templates do not say where an answer lies. It begins where the rendering of the messages before it ends,
the header of the answer included (``add_generation_prompt``), and ends where the rendering of the messages up
to it ends; both renderings must be beginnings of the whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mindspeed_lora.data.conversation import Message, UnusableRow, split_tools
from mindspeed_lora.data.encoding import TokenRow, label
from mindspeed_lora.data.loss_weights import KEYS, message_weights
from mindspeed_lora.data.prompt_template import PROMPT
from mindspeed_lora.data.tokenizer import encode_batch
from mindspeed_lora.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


@dataclass(frozen=True)
class _Rendered:
    """A conversation as text."""

    text: str
    spans: list[Span]
    """Where each answer lies; none where nobody needs to know."""
    weights: tuple[float, ...] | None = None
    """Of the answers."""


class HfTemplateEncoder:
    """Encodes by the chat template that the tokenizer brings along."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, loss_on: str = "assistant", thinking: bool | None = None
    ) -> None:
        if not tokenizer.chat_template:
            raise Refused(
                f"--hf-chat-template: the tokenizer {tokenizer.name_or_path} has no chat template; "
                "give --prompt-type instead"
            )
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.options = {} if thinking is None else {"enable_thinking": thinking}
        """What the template is told beside the messages."""
        self._special_texts = tuple(
            sorted(
                (token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True
            )
        )

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[TokenRow | UnusableRow]:
        """One result a conversation, in order: the row, or why there is none."""
        rendered = [self._render_with_spans(conversation) for conversation in conversations]
        usable = [row for row in rendered if not isinstance(row, UnusableRow)]
        rows = iter(self._tokenise(usable))
        return [row if isinstance(row, UnusableRow) else next(rows) for row in rendered]

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        from jinja2.exceptions import TemplateError

        messages, tools = split_tools(messages)
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.options,
            )
        except TemplateError as error:
            raise Refused(f"the tokenizer's chat template refuses the messages: {error}") from error
        return str(text)

    def _render_with_spans(self, conversation: Sequence[Message]) -> _Rendered | UnusableRow:
        """The text of a conversation and where each answer lies in it."""
        messages: list[Message] = [
            {key: value for key, value in message.items() if key not in KEYS} for message in conversation
        ]
        weights = message_weights(conversation, self.loss_on)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            return UnusableRow("there is no assistant message")
        whole = self._render(messages)
        if self.loss_on == "all" and weights is None:
            return _Rendered(whole, [])
        return _Rendered(whole, [self._span(whole, messages, number) for number in answers], weights)

    def _span(self, whole: str, messages: list[Message], number: int) -> Span:
        before = self._render(messages[:number], add_generation_prompt=True)
        through = self._render(messages[: number + 1]) if number + 1 < len(messages) else whole
        start = len(before)
        if whole.startswith(before):
            fits = whole.startswith(through)
            end = len(through) if fits else self._end(whole, start, messages[number])
            if end is not None and end > start:
                return start, self._without_trailing_space(whole, start, end)
        raise Refused(
            "the tokenizer's chat template renders the beginning of a conversation differently when more "
            f"messages follow (message {number + 1} of {len(messages)}), so that it cannot be told which "
            "tokens are the assistant's; give --prompt-type instead of --hf-chat-template, or --loss-on all"
        )

    def _end(self, whole: str, start: int, message: Message) -> int | None:
        """Where an answer ends that is rendered otherwise when it is the last (without its thoughts, say)."""
        content = str(message.get("content") or "").rpartition("</think>")[2].strip()
        found = whole.find(content, start) if content else -1
        if found < 0:
            return None
        end = found + len(content)
        for special in self._special_texts:
            if special and whole.startswith(special, end):
                return end + len(special)
        return None

    def _without_trailing_space(self, whole: str, start: int, end: int) -> int:
        """An answer ends with its end token, without the line feed that templates put behind it."""
        stripped = whole[start:end].rstrip()
        return start + len(stripped) if stripped.endswith(self._special_texts) else end

    def _tokenise(self, rendered: Sequence[_Rendered]) -> list[TokenRow]:
        if not self.tokenizer.is_fast:
            return [self._tokenise_parts(row) for row in rendered]
        texts = [row.text for row in rendered]
        if not any(row.spans for row in rendered):
            return [_whole(ids) for ids in encode_batch(self.tokenizer, texts)]
        encodings = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        return [
            self._by_offsets(encoding.ids, encoding.offsets, row)
            for encoding, row in zip(encodings, rendered, strict=True)
        ]

    def _by_offsets(self, token_ids: list[int], offsets: list[Span], row: _Rendered) -> TokenRow:
        """A token belongs to an answer if any of its characters does."""
        flat = itertools.chain.from_iterable(offsets)
        bounds = np.fromiter(flat, dtype=np.int64, count=2 * len(offsets)).reshape(-1, 2)
        answers = np.full(len(token_ids), PROMPT, dtype=np.int32)
        for number, (start, end) in enumerate(row.spans):
            answers[(bounds[:, 1] > start) & (bounds[:, 0] < end)] = number
        return label(np.array(token_ids, dtype=np.int32), answers, self.loss_on, row.weights)

    def _tokenise_parts(self, row: _Rendered) -> TokenRow:
        """Without offsets (slow tokenizers) the text is cut where answers begin and end."""
        if not row.spans:
            return _whole(encode_batch(self.tokenizer, [row.text])[0])
        cuts = [0, *(bound for span in row.spans for bound in span), len(row.text)]
        parts = [row.text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
        token_ids: list[int] = []
        answers: list[int] = []
        for number, ids in enumerate(encode_batch(self.tokenizer, parts)):
            token_ids += ids
            answers += [number // 2 if number % 2 else PROMPT] * len(ids)
        return label(
            np.array(token_ids, dtype=np.int32), np.array(answers, dtype=np.int32), self.loss_on, row.weights
        )


def _whole(token_ids: list[int]) -> TokenRow:
    """The row all of whose tokens carry loss."""
    ids: np.ndarray[Any, Any] = np.array(token_ids, dtype=np.int32)
    return TokenRow(ids, ids.copy())
