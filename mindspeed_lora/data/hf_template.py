"""Encoding by the tokenizer's own chat template, and finding out which of its text the assistant writes.

Chat templates do not say where an answer lies. It begins where the rendering of the messages before it ends,
the header of the answer included (``add_generation_prompt``), and ends where the rendering of the messages up
to it ends; both renderings must be beginnings of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mindspeed_lora.data.answer_tokens import AnswerTokens, Span
from mindspeed_lora.data.conversation import (
    REASONING,
    Message,
    Tool,
    UnusableRow,
    split_tools,
    with_thoughts,
)
from mindspeed_lora.data.encoding import TokenRow, label
from mindspeed_lora.data.loss_weights import KEYS, message_weights
from mindspeed_lora.data.prompt_template import PROMPT
from mindspeed_lora.data.tokenizer import encode_batch
from mindspeed_lora.data.tools import bare
from mindspeed_lora.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Request(NamedTuple):
    """What is to be rendered."""

    messages: list[Message]
    tools: tuple[Tool, ...]
    asks: bool
    """With the header of an answer behind it (``add_generation_prompt``)."""


@dataclass(frozen=True)
class _Given:
    """A conversation whose answers are to be found."""

    messages: list[Message]
    tools: tuple[Tool, ...]
    answers: list[int]
    """Numbers of the messages whose places are asked for."""
    weights: tuple[float, ...] | None

    def is_last(self, number: int) -> bool:
        """Whether no message follows."""
        return number + 1 == len(self.messages)

    @property
    def requests(self) -> list[_Request]:
        """The whole; for each answer what stands before it, and what ends with it if that is not the whole."""
        requests = [_Request(self.messages, self.tools, False)]
        for number in self.answers:
            requests.append(_Request(self.messages[:number], self.tools, True))
            if not self.is_last(number):
                requests.append(_Request(self.messages[: number + 1], self.tools, False))
        return requests


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
        self._template_text = str(tokenizer.chat_template)
        self._answer_tokens = AnswerTokens(tokenizer) if tokenizer.is_fast else None
        self._special_texts = tuple(
            sorted(
                (token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True
            )
        )

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[TokenRow | UnusableRow]:
        """One result a conversation, in order: the row, or why there is none."""
        given = [self._given(conversation) for conversation in conversations]
        texts = self._render(
            [request for own in given if isinstance(own, _Given) for request in own.requests]
        )
        rendered = [
            own if isinstance(own, UnusableRow) else self._rendered(own, [next(texts) for _ in own.requests])
            for own in given
        ]
        usable = [row for row in rendered if not isinstance(row, UnusableRow)]
        rows = iter(self._tokenise(usable))
        return [row if isinstance(row, UnusableRow) else next(rows) for row in rendered]

    def _given(self, conversation: Sequence[Message]) -> _Given | UnusableRow:
        """A conversation, and what of it is rendered."""
        stripped = [self._as_the_template_knows_it(message) for message in conversation]
        weights = message_weights(conversation, self.loss_on)
        messages, tools = split_tools(stripped)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            return UnusableRow("there is no assistant message")
        if self.loss_on == "all" and weights is None:
            answers = []
        elif answers[0] == 0:
            return UnusableRow("the first message is the assistant's")
        return _Given(messages, tools, answers, weights)

    def _as_the_template_knows_it(self, message: Message) -> Message:
        """Without what is not for templates; thoughts are in the text where this one has no other place for them."""
        plain = {key: value for key, value in message.items() if key not in KEYS}
        if REASONING in plain and REASONING not in self._template_text:
            plain["content"] = with_thoughts(message)
            del plain[REASONING]
        return plain

    def _render(self, requests: Sequence[_Request]) -> Iterator[str]:
        """The texts, in order. Those without tools are rendered many at a time, since a call has costs of its own."""
        texts: dict[int, str] = {}
        together: dict[bool, list[int]] = {False: [], True: []}
        for number, request in enumerate(requests):
            if request.tools:
                (texts[number],) = self._apply([request])
            else:
                together[request.asks].append(number)
        for numbers in together.values():
            found = self._apply([requests[number] for number in numbers])
            texts.update(zip(numbers, found, strict=True))
        return (texts[number] for number in range(len(requests)))

    def _apply(self, requests: Sequence[_Request]) -> list[str]:
        """The texts of requests that have the same tools and the same end."""
        if not requests:
            return []
        try:
            texts: list[str] = self.tokenizer.apply_chat_template(
                [request.messages for request in requests],
                tools=[dict(tool) for tool in requests[0].tools] or None,
                tokenize=False,
                add_generation_prompt=requests[0].asks,
                **self.options,
            )
        except Exception as error:
            # Templates are programs: what they cannot do with a row may be any of Python's errors.
            raise Refused(f"the tokenizer's chat template refuses the messages: {error}") from error
        return texts

    def _rendered(self, given: _Given, texts: Sequence[str]) -> _Rendered:
        """The text of a conversation and where each answer lies in it; ``texts`` are those of its requests."""
        whole, rest = texts[0], iter(texts[1:])
        self._refuse_lost_tools(given, whole)
        spans = []
        for number in given.answers:
            before = next(rest)
            through = whole if given.is_last(number) else next(rest)
            spans.append(self._span(given, number, whole, before, through))
        return _Rendered(whole, spans, given.weights)

    def _refuse_lost_tools(self, given: _Given, whole: str) -> None:
        """A template that leaves out tools or calls would train empty answers, or calls of unknown tools."""
        called = [
            call["function"]["name"] for message in given.messages for call in message.get("tool_calls") or ()
        ]
        names = [str(bare(tool)["name"]) for tool in given.tools]
        for variable, found in (("tool_calls", called), ("tools", names)):
            if found and (variable not in self._template_text or not any(name in whole for name in found)):
                raise Refused(
                    f"the tokenizer's chat template does not write {variable.replace('_', ' ')}, which this row has "
                    f"({found[0]}); give --prompt-type"
                )

    def _span(self, given: _Given, number: int, whole: str, before: str, through: str) -> Span:
        start = len(before)
        if whole.startswith(before):
            fits = whole.startswith(through)
            end = len(through) if fits else self._end(whole, start, given.messages[number])
            if end is not None and end > start:
                return start, self._without_trailing_space(whole, start, end)
        raise Refused(
            "the tokenizer's chat template renders the beginning of a conversation differently when more "
            f"messages follow (message {number + 1} of {len(given.messages)}), so that it cannot be told which "
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
        if self._answer_tokens is None:
            return [self._tokenise_parts(row) for row in rendered]
        texts = [row.text for row in rendered]
        if not any(row.spans for row in rendered):
            return [_whole(ids) for ids in encode_batch(self.tokenizer, texts)]
        encoded = self._answer_tokens.encode(texts, [row.spans for row in rendered])
        return [
            label(ids, answers, self.loss_on, row.weights)
            for (ids, answers), row in zip(encoded, rendered, strict=True)
        ]

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
