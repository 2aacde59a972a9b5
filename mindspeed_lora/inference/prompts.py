"""Prompts: read from flags or a file, and turned into tokens, raw or by a template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mindspeed_lora.config.inference import InferenceConfig
from mindspeed_lora.config.tokenizer import TokenizerConfig
from mindspeed_lora.data.conversation import Message, UnusableRow
from mindspeed_lora.data.encoding import TemplateEncoder
from mindspeed_lora.data.prompt_template import (
    PromptTemplate,
    missing_end_notice,
    missing_end_token,
    special_tokens,
)
from mindspeed_lora.data.sample import IGNORE_INDEX
from mindspeed_lora.data.template_files import chosen_template
from mindspeed_lora.data.tokenizer import encode_batch
from mindspeed_lora.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_prompts(inference: InferenceConfig) -> list[str]:
    """The prompts of ``--prompt`` or ``--prompt-file``, in order.

    Raises:
        Refused: the file cannot be read, holds no prompt, or has a row without one.
    """
    if inference.prompt_file is None:
        prompts = list(inference.prompt or ())
    else:
        prompts = _read_file(Path(inference.prompt_file))
    # Command lines and JSON escapes can hold lone surrogates, which no tokenizer takes.
    return [prompt.encode("utf-8", "replace").decode("utf-8") for prompt in prompts]


def _read_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Refused(f"--prompt-file {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise Refused(
            f"--prompt-file {path}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from error
    # Only line feeds end a line: a prompt may hold the other characters that str.splitlines() splits at.
    rows = [(number, row.rstrip("\r")) for number, row in enumerate(text.split("\n"), 1) if row.strip()]
    if not rows:
        raise Refused(
            f"--prompt-file {path}: holds no prompt; expected one a line, or JSONL with a key prompt"
        )
    if path.suffix == ".json" and rows[0][1].lstrip().startswith("["):
        raise Refused(f"--prompt-file {path}: is one JSON list; write its objects as JSONL, one a line")
    if path.suffix == ".jsonl" or _is_json_prompt(rows[0][1]):
        return [_json_prompt(path, number, row) for number, row in rows]
    return [row for _, row in rows]


def _is_json_prompt(row: str) -> bool:
    try:
        value = json.loads(row)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "prompt" in value


def _json_prompt(path: Path, number: int, row: str) -> str:
    try:
        value = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise Refused(f"--prompt-file {path}, row {number}: not JSON ({error})") from error
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str):
        raise Refused(
            f"--prompt-file {path}, row {number}: expected an object whose prompt is a text, found {row[:60]}"
        )
    return prompt


class PromptEncoder:
    """Turns prompts into tokens: as they are, or by ``--prompt-type`` or the tokenizer's chat template."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: TokenizerConfig, add_eos_token: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.template = None if config.prompt_type is None else chosen_template(config)
        self.hf_chat_template = config.hf_chat_template
        self.add_eos_token = add_eos_token
        if self.hf_chat_template and not tokenizer.chat_template:
            raise Refused(
                f"--hf-chat-template: the tokenizer {tokenizer.name_or_path} has no chat template; "
                "give --prompt-type instead"
            )
        if add_eos_token and tokenizer.eos_token_id is None:
            raise Refused(f"--add-eos-token: the tokenizer {tokenizer.name_or_path} has no end token")

    def notices(self) -> list[str]:
        """What may surprise about the form of prompts."""
        if self.template is not None:
            lacking = missing_end_notice(self.template, self.tokenizer, self.template.name)
            return [] if lacking is None else [lacking]
        if self.is_raw and self.tokenizer.chat_template:
            return [
                "prompts are given to the model as they are; --hf-chat-template asks by its chat template"
            ]
        return []

    @property
    def is_raw(self) -> bool:
        """Whether prompts are tokenised as they are."""
        return self.template is None and not self.hf_chat_template

    def encode(self, prompt: str) -> list[int]:
        """The tokens of one prompt, at least one.

        Raises:
            Refused: it has none.
        """
        if self.is_raw:
            tokens = list(self.tokenizer(prompt)["input_ids"])
        else:
            tokens = self._encode_turns([{"role": "user", "content": prompt}])
        return self._completed(tokens)

    def encode_conversation(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation that ends with the user's message, ready for the answer."""
        if self.is_raw:
            return self.encode("\n".join(message["content"] for message in messages))
        return self._completed(self._encode_turns(messages))

    def end_token(self, text: str) -> int:
        """The number of a token of ``--add-eos-token``.

        Raises:
            Refused: the vocabulary does not have it as one token.
        """
        number = self.tokenizer.get_vocab().get(text)
        if number is None:
            raise Refused(
                f"--add-eos-token {text}: the tokenizer {self.tokenizer.name_or_path} has no such token; texts that "
                "end an answer are --stop-words"
            )
        return int(number)

    def stop_sequences(self) -> list[tuple[int, ...]]:
        """What ends an answer in the form of this encoder, beside the model's own end tokens."""
        if self.is_raw:
            return []
        end = self.tokenizer.eos_token_id
        stops: list[tuple[int, ...]] = [] if end is None else [(int(end),)]
        if self.template is not None:
            end = special_tokens(self.template, self.tokenizer).end
            stops += [] if end is None else [(end,)]
            spelled_out = missing_end_token(self.template, self.tokenizer)
            texts = [*self.template.stop_words, *([] if spelled_out is None else [spelled_out])]
            stops += [tuple(tokens) for tokens in encode_batch(self.tokenizer, texts) if tokens]
        return list(dict.fromkeys(stops))

    def _encode_turns(self, messages: Sequence[Message]) -> list[int]:
        if self.template is not None:
            return self._encode_as_trained(self.template, messages)
        from jinja2.exceptions import TemplateError

        try:
            return list(
                self.tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=True, return_dict=False
                )
            )
        except TemplateError as error:
            raise Refused(f"--hf-chat-template: the template refuses the messages ({error})") from error

    def _encode_as_trained(self, template: PromptTemplate, messages: Sequence[Message]) -> list[int]:
        """A row of training up to where its last answer begins; what the answer is does not matter."""
        answered = [*messages, {"role": "assistant", "content": "."}]
        (row,) = TemplateEncoder(self.tokenizer, template, "last-assistant").encode([answered])
        if isinstance(row, UnusableRow):
            raise Refused(f"--prompt-type {template.name}: the template does not take the messages ({row})")
        return [int(token) for token in row.input_ids[: (row.labels != IGNORE_INDEX).argmax()]]

    def _completed(self, tokens: list[int]) -> list[int]:
        if not tokens:
            start = self.tokenizer.bos_token_id
            start = self.tokenizer.eos_token_id if start is None else start
            if start is None:
                raise Refused("the prompt has no tokens, and the tokenizer no start token; give a prompt")
            tokens = [int(start)]
        return [*tokens, int(self.tokenizer.eos_token_id)] if self.add_eos_token else tokens


def check_tokens(tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuses tokens that the model does not have: one process would end in an index, several in numbers.

    Raises:
        Refused: with the token.
    """
    largest = max(tokens, default=0)
    if largest >= vocab_size:
        raise Refused(
            f"the tokenizer {tokenizer.name_or_path} gives token {largest}, but the model has {vocab_size} words; give "
            "the model's own tokenizer"
        )


def end_sequences(eos_token_ids: Sequence[int], *encoders: PromptEncoder) -> tuple[tuple[int, ...], ...]:
    """The sequences of tokens that end an answer: the model's own, and those of the encoders' forms."""
    stops: list[tuple[int, ...]] = [(token,) for token in eos_token_ids]
    for encoder in encoders:
        stops += encoder.stop_sequences()
    end = encoders[0].tokenizer.eos_token_id
    if not stops and end is not None:
        stops.append((int(end),))
    return tuple(dict.fromkeys(stops))
