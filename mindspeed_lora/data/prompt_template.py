"""Prompt templates: how system text, questions and answers become pieces of text.

What stands before an answer is tokenised together, each answer on its own, so that its first token does not
depend on the prompt. In slots ``{content}`` stands for the text of the message and ``{idx}`` for the number of the
question, from 0; a slot that is ``{bos}``, ``{end}`` or ``{token:…}`` stands for a special token.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mindspeed_lora.data.conversation import THOUGHT_WORDS, Call, Turns
from mindspeed_lora.data.tools import CALL_JOINT, ToolFormat, tool_formats, write_call

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTENT = "{content}"
NUMBER = "{idx}"
BOS = "{bos}"
END = "{end}"
TOKEN = "{token:"
"""How a slot begins that is a token of the vocabulary: ``{token:<|user|>}``."""
PROMPT = -1
"""In place of the number of an answer: the piece belongs to no answer."""

Piece = tuple[str | int, int]
"""A text to tokenise or a token id, and the number of the answer that it belongs to, or :data:`PROMPT`."""


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """One template of ``templates.json`` or of a user's file."""

    name: str
    system: tuple[str, ...]
    user: tuple[str, ...]
    assistant: tuple[str, ...]
    prefix: tuple[str, ...] = ()
    """Before everything."""
    separator: tuple[str, ...] = ()
    """Before every question but the first."""
    answer_header: str = ""
    """Follows each question within its last slot."""
    function: tuple[str, ...] = ()
    """An answer that calls functions; empty: as ``assistant``."""
    observation: tuple[str, ...] = ()
    """Results of tools in place of a question; empty: as ``user``."""
    observation_joint: str = "\n"
    """Between the results of several calls."""
    tool_format: str = "default"
    """Name of the format in ``tool_formats.json``."""
    call: str | None = None
    """The text of one call, where it is not that of the tool format."""
    default_system: str = ""
    """Taken where a row has no system text."""
    system_in_first_user: bool = False
    """The system text goes before the first question (``Llama2Template``)."""
    force_system: bool = False
    """The system slots are written where there is no system text, too."""
    end_token: str | None = None
    """Ends an answer instead of the tokenizer's own end token (``replace_eos``)."""
    stop_words: tuple[str, ...] = ()
    """Further texts at which generation ends."""
    efficient_eos: bool = False
    """No end token between the turns: what follows an answer is trained to be the end token, and one stands at the
    end of the row."""
    thought_words: tuple[str, str] | None = None
    """Beginning and end of an answer's thoughts (``ReasoningTemplate``)."""
    empty_thought: str | None = None
    """Goes before answers that do not think, as part of the prompt …"""
    thinking: bool | None = None
    """… or, when true, of the answer; when false all thoughts are taken out (``--enable-thinking``)."""

    @property
    def tools(self) -> ToolFormat:
        """How tools and calls are written."""
        return tool_formats()[self.tool_format]

    @property
    def call_text(self) -> str:
        """The text of one call, with its fields."""
        return self.call if self.call is not None else self.tools.call

    @property
    def thought_frame(self) -> tuple[str, str]:
        """What stands before thoughts that a row tells apart from the answer, and behind them."""
        start, end = self.thought_words or THOUGHT_WORDS
        if self.thought_words and self.empty_thought != "\n\n".join((start, end, "")):
            return start, end
        return f"{start}\n", f"\n{end}\n\n"

    @property
    def thought_end(self) -> str:
        """What thoughts end with."""
        return (self.thought_words or THOUGHT_WORDS)[1].strip()

    def with_calls(self, answer: str, calls: Sequence[Call]) -> str:
        """An answer with its calls behind it, on a line of their own, but for those behind thoughts."""
        written = CALL_JOINT.join(write_call(self.call_text, call) for call in calls)
        joint = "" if not answer or answer.rstrip().endswith(self.thought_end) else CALL_JOINT
        return answer + joint + written

    def thinks(self, answer: str) -> bool:
        """Whether an answer has thoughts, or a part of their frame."""
        return any(word.strip() in answer for word in self.thought_words or ())

    def without_thoughts(self, answer: str) -> str:
        """An answer without the thoughts in it."""
        if self.thought_words is None:
            return answer
        start, end = (re.escape(word.strip()) for word in self.thought_words)
        return re.sub(f"{start}.*?{end}", "", answer, flags=re.DOTALL).lstrip("\n")


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that a tokenizer has for the special slots of a template; None where it has none."""

    bos: int | None
    end: int | None
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Those of ``{token:…}`` slots by their text; what is missing is written as text."""


def special_tokens(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """``{end}`` is the template's end token where the vocabulary has it, else the tokenizer's."""
    vocabulary = tokenizer.get_vocab()
    end = tokenizer.eos_token_id
    if template.end_token is not None:
        end = vocabulary.get(template.end_token, end)
    tokens = {
        text: vocabulary[text]
        for text in map(token_of, all_slots(template))
        if text is not None and text in vocabulary
    }
    return SpecialTokens(tokenizer.bos_token_id, end, tokens)


def missing_end_token(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template's end token, if the tokenizer's vocabulary lacks it."""
    if template.end_token is None or template.end_token in tokenizer.get_vocab():
        return None
    return template.end_token


def missing_end_notice(
    template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, prompt_type: str | None
) -> str | None:
    """What to tell where the vocabulary lacks the template's end token."""
    lacking = missing_end_token(template, tokenizer)
    if lacking is None:
        return None
    return (
        f"the tokenizer has no token {lacking}, which --prompt-type {prompt_type} uses: it is written as "
        "ordinary text, and answers end with the tokenizer's own end token"
    )


def token_of(slot: str) -> str | None:
    """The text of a ``{token:…}`` slot; None for every other slot."""
    return slot[len(TOKEN) : -1] if slot.startswith(TOKEN) and slot.endswith("}") else None


def all_slots(template: PromptTemplate) -> tuple[str, ...]:
    """Every slot of a template."""
    return (
        *(*template.prefix, *template.system, *template.separator, *template.user),
        *(*template.assistant, *template.function, *template.observation),
    )


def pieces(template: PromptTemplate, turns: Turns, special: SpecialTokens) -> Iterator[Piece]:
    """The pieces of a conversation in order, without empty texts and special tokens that do not exist."""
    system = turns.system or template.default_system
    if turns.tools:
        system += template.tools.describe(turns.tools)
    yield from _slots(template.prefix, "", 0, special, PROMPT)
    if (system or template.force_system) and not template.system_in_first_user:
        yield from _slots(template.system, system, 0, special, PROMPT)
    for number, (question, answer) in enumerate(zip(turns.questions, turns.answers, strict=True)):
        slots = user_slots(template)
        if number in turns.results:
            slots = observation_slots(template)
            question = template.observation_joint.join(turns.results[number])
        if number > 0:
            yield from _slots(template.separator, "", number, special, PROMPT)
        elif system and template.system_in_first_user:
            question = "".join(template.system).replace(CONTENT, system, 1) + question
        yield from _slots(slots, question, number, special, PROMPT)
        yield from _answer(template, turns, number, answer, special)
    if template.efficient_eos and special.end is not None and turns.answers:
        yield special.end, len(turns.answers) - 1


def _answer(
    template: PromptTemplate, turns: Turns, number: int, answer: str, special: SpecialTokens
) -> Iterator[Piece]:
    if template.thinking is False:
        answer = template.without_thoughts(answer)
    if template.empty_thought and not template.thinks(answer) and number not in turns.without_thought:
        yield template.empty_thought, number if template.thinking else PROMPT
    slots = template.assistant
    if number in turns.calls:
        slots = template.function or template.assistant
        answer = template.with_calls(answer, turns.calls[number])
    yield from _slots(slots, answer, number, special, number)


def user_slots(template: PromptTemplate) -> tuple[str, ...]:
    """The slots of a question, the last one with the header of the answer."""
    return (*template.user[:-1], template.user[-1] + template.answer_header)


def observation_slots(template: PromptTemplate) -> tuple[str, ...]:
    """The slots of results of tools, the last one with the header of the answer."""
    slots = template.observation or template.user
    return (*slots[:-1], slots[-1] + template.answer_header)


def _slots(
    slots: tuple[str, ...], content: str, number: int, special: SpecialTokens, answer: int
) -> Iterator[Piece]:
    for slot in slots:
        piece: str | int | None
        token, head, found, tail = _taken_apart(slot)
        if slot == BOS:
            piece = special.bos
        elif slot == END:
            piece = special.end
        elif token is not None:
            piece = special.tokens.get(token, token)
        else:
            head, tail = head.replace(NUMBER, str(number)), tail.replace(NUMBER, str(number))
            piece = head + content + tail if found else head
        if piece is not None and piece != "":
            yield piece, answer


@functools.cache
def _taken_apart(slot: str) -> tuple[str | None, str, str, str]:
    """The special token of a slot, and what stands before its content, the content's mark, and behind it."""
    return token_of(slot), *slot.partition(CONTENT)
