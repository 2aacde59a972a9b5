"""Questions in the model's form: as plain text, or as turns of a conversation; then as tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mindspeed_lora.data.conversation import Message
from mindspeed_lora.errors import Refused
from mindspeed_lora.evaluation.benchmark import Question
from mindspeed_lora.inference.generator import Request
from mindspeed_lora.inference.prompts import PromptEncoder
from mindspeed_lora.inference.scoring import ScoreRequest

_BETWEEN = "\n\n"
PLACES = ("{subject}", "{examples}", "{question}")
"""The words of ``--instruction-template``."""


@dataclass(frozen=True)
class Asked:
    """A question as the model gets it."""

    question: Question
    prompt: str
    """The full text that the model sees."""
    tokens: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    """Of the choices; none where the answer is generated."""
    cut: int
    """Tokens that were cut off in front, since the model reads no more."""

    @property
    def to_score(self) -> ScoreRequest:
        """What is scored."""
        return ScoreRequest(self.tokens, self.continuations)

    def to_generate(self, max_new_tokens: int) -> Request:
        """What is generated."""
        return Request(self.tokens, max_new_tokens, stream=self.question.index)


def check_instruction_template(template: str | None) -> None:
    """Refuses a template that loses the question.

    Raises:
        Refused: with the words that it may have.
    """
    if template is not None and "{question}" not in template:
        raise Refused(
            f"--instruction-template {template!r}: has no {{question}} in it; its words are {', '.join(PLACES)}"
        )


class QuestionEncoder:
    """Turns questions into tokens.

    Args:
        encoder: raw, or with the template of a conversation.
        longest: tokens that the model reads.
        template: ``--instruction-template``.
    """

    def __init__(self, encoder: PromptEncoder, longest: int, template: str | None = None) -> None:
        self.encoder = encoder
        self.longest = longest
        self.template = template

    def to_score(self, question: Question) -> Asked:
        """A question whose choices are compared."""
        if self.encoder.is_raw:
            prompt = self._plain(question)
            pairs = [
                encode_pair(self._encode, prompt, question.separator + choice) for choice in question.choices
            ]
            context, continuations = pairs[0][0], tuple(continuation for _, continuation in pairs)
        else:
            prompt, context = self._conversation(question)
            continuations = tuple(
                tuple(self.encoder.tokenizer(choice, add_special_tokens=False)["input_ids"])
                for choice in question.choices
            )
            if not all(continuations):
                raise Refused(
                    f"{question.subject}, question {question.index}: a choice is empty; give each a text"
                )
        # The last token of a continuation is predicted, not read.
        room = self.longest + 1 - max(map(len, continuations))
        return self._asked(question, prompt, context, continuations, room)

    def to_generate(self, question: Question, max_new_tokens: int) -> Asked:
        """A question whose answer is generated."""
        if self.encoder.is_raw:
            prompt = self._plain(question)
            context = tuple(self.encoder.encode(prompt))
        else:
            prompt, context = self._conversation(question)
        return self._asked(question, prompt, context, (), self.longest - max_new_tokens)

    def _asked(
        self,
        question: Question,
        prompt: str,
        context: tuple[int, ...],
        continuations: tuple[tuple[int, ...], ...],
        room: int,
    ) -> Asked:
        if room < 1:
            raise Refused(
                f"{question.subject}, question {question.index}: the model reads {self.longest} tokens, which leaves "
                "no room for a prompt beside the answer; raise --seq-length, or lower --max-new-tokens"
            )
        cut = max(0, len(context) - room)
        if cut:
            context = context[cut:]
            prompt = str(self.encoder.tokenizer.decode(list(context)))
        return Asked(question, prompt, context, continuations, cut)

    def _encode(self, text: str) -> list[int]:
        return list(self.encoder.tokenizer(text)["input_ids"])

    def _plain(self, question: Question) -> str:
        shots = "".join(
            shot.question + question.separator + shot.answer + _BETWEEN for shot in question.shots
        )
        if self.template is not None:
            examples = shots.removesuffix(_BETWEEN)
            values = dict(zip(PLACES, (question.subject, examples, question.text), strict=True))
            return _filled(self.template, values)
        instruction = question.instruction + _BETWEEN if question.instruction else ""
        return instruction + shots + question.text

    def _conversation(self, question: Question) -> tuple[str, tuple[int, ...]]:
        """Text and tokens of the conversation up to where the answer begins."""
        turns = [text for shot in question.shots for text in (shot.question, shot.answer)]
        turns.append(question.text)
        if self.template is not None:
            turns[-1] = self._plain(replace(question, shots=()))
        elif question.instruction:
            turns[0] = question.instruction + _BETWEEN + turns[0]
        roles = ("user", "assistant")
        messages: list[Message] = [
            {"role": roles[number % 2], "content": text} for number, text in enumerate(turns)
        ]
        tokens = tuple(self.encoder.encode_conversation(messages))
        return str(self.encoder.tokenizer.decode(list(tokens))), tokens


def encode_pair(
    encode: Callable[[str], Sequence[int]], context: str, continuation: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of a context, and what its continuation adds to them, by the rule of lm-evaluation-harness.

    Blanks at the end of the context belong to the continuation, as tokenizers join them to the word behind them.
    """
    trimmed = context.rstrip()
    if trimmed:
        continuation = context[len(trimmed) :] + continuation
        context = trimmed
    before, whole = tuple(encode(context)), tuple(encode(context + continuation))
    added = whole[len(before) :]
    if not before or not added:
        raise Refused(
            f"{(context + continuation)[-60:]!r}: the tokenizer gives no tokens for a question or its choice"
        )
    return before, added


def _filled(template: str, values: dict[str, str]) -> str:
    """The template with its words replaced; braces in questions stay as they are."""
    for place, value in values.items():
        before, found, after = template.partition(place)
        if found:
            # What was put in must not be looked into again.
            rest = {key: other for key, other in values.items() if key != place}
            return _filled(before, rest) + value + _filled(after, rest)
    return template
