"""Prompt templates as data (``templates.json``): how system text, questions and answers become pieces of
text.

What stands before an answer is tokenised together, each answer on its own, so that its first token does not
depend on the prompt. Keys of a template: ``prefix`` (before everything), ``system``, ``user``,
``assistant`` and ``separator`` (before every further question) are lists of pieces; in them ``{content}``
stands for the text of the message, and the pieces ``{bos}`` and ``{end}`` for special tokens.
``answer_header`` follows each question within its piece. ``default_system`` is used where a row has no system
text. ``system_in_first_user`` puts the system text before the first question. ``end_token`` ends an answer
instead of the tokenizer's own end token. ``empty_thought`` goes, as part of the prompt, before answers that
do not think.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from mindspeed_lora.data.conversation import Turns
from mindspeed_lora.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTENT = "{content}"
BOS = "{bos}"
END = "{end}"
PROMPT = -1
"""In place of the number of an answer: the piece belongs to no answer."""

Piece = tuple[str | int, int]
"""A text to tokenise or a token id, and the number of the answer that it belongs to, or :data:`PROMPT`."""


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """One template of ``templates.json``; the module's docstring tells the fields."""

    name: str
    system: tuple[str, ...]
    user: tuple[str, ...]
    assistant: tuple[str, ...]
    prefix: tuple[str, ...] = ()
    separator: tuple[str, ...] = ()
    answer_header: str = ""
    default_system: str = ""
    system_in_first_user: bool = False
    end_token: str | None = None
    empty_thought: str | None = None

    def needs_thought(self, answer: str) -> bool:
        """Whether the empty thought goes before this answer."""
        if self.empty_thought is None:
            return False
        start, _, end = self.empty_thought.partition("\n\n")
        return start not in answer and end.strip() not in answer


@functools.cache
def prompt_templates() -> dict[str, PromptTemplate]:
    """All templates by name."""
    text = resources.files("mindspeed_lora.data").joinpath("templates.json").read_text(encoding="utf-8")
    return {name: _from_json(name, slots) for name, slots in json.loads(text).items()}


def _from_json(name: str, slots: dict[str, Any]) -> PromptTemplate:
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in slots.items()
    }
    return PromptTemplate(name=name, **fields)


def prompt_template(prompt_type: str) -> PromptTemplate:
    """The template of that name.

    Raises:
        Refused: there is none.
    """
    templates = prompt_templates()
    if prompt_type not in templates:
        raise Refused(f"--prompt-type {prompt_type}: unknown; expected one of {', '.join(sorted(templates))}")
    return templates[prompt_type]


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that a tokenizer has for the special pieces of a template; None where it has none."""

    bos: int | None
    end: int | None


def special_tokens(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """``{end}`` is the template's end token where the vocabulary has it, else the tokenizer's."""
    end = tokenizer.eos_token_id
    if template.end_token is not None:
        end = tokenizer.get_vocab().get(template.end_token, end)
    return SpecialTokens(tokenizer.bos_token_id, end)


def missing_end_token(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template's end token, if the tokenizer's vocabulary lacks it."""
    if template.end_token is None or template.end_token in tokenizer.get_vocab():
        return None
    return template.end_token


def pieces(template: PromptTemplate, turns: Turns, special: SpecialTokens) -> Iterator[Piece]:
    """The pieces of a conversation in order, without empty texts and special tokens that do not exist."""
    system = turns.system or template.default_system
    yield from _slots(template.prefix, "", special, PROMPT)
    if system and not template.system_in_first_user:
        yield from _slots(template.system, system, special, PROMPT)
    for number, (question, answer) in enumerate(zip(turns.questions, turns.answers, strict=True)):
        if number > 0:
            yield from _slots(template.separator, "", special, PROMPT)
        elif system and template.system_in_first_user:
            question = "".join(template.system).replace(CONTENT, system, 1) + question
        yield from _slots(user_slots(template), question, special, PROMPT)
        if template.needs_thought(answer):
            yield template.empty_thought or "", PROMPT
        yield from _slots(template.assistant, answer, special, number)


def user_slots(template: PromptTemplate) -> tuple[str, ...]:
    """The slots of a question, the last one with the header of the answer."""
    return (*template.user[:-1], template.user[-1] + template.answer_header)


def _slots(slots: tuple[str, ...], content: str, special: SpecialTokens, answer: int) -> Iterator[Piece]:
    for slot in slots:
        piece: str | int | None
        if slot == BOS:
            piece = special.bos
        elif slot == END:
            piece = special.end
        else:
            piece = slot.replace(CONTENT, content, 1)
        if piece is not None and piece != "":
            yield piece, answer
