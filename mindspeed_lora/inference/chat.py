"""The task chat: questions from standard input, answers that appear while they are generated."""

from __future__ import annotations

from dataclasses import dataclass, field

from mindspeed_lora.data.conversation import Message
from mindspeed_lora.errors import Refused
from mindspeed_lora.inference.generator import Request
from mindspeed_lora.inference.plan import CHAT, InferencePlan
from mindspeed_lora.inference.prompts import check_tokens
from mindspeed_lora.inference.session import InferenceSession
from mindspeed_lora.inference.standard_input import StandardInput
from mindspeed_lora.inference.streaming import AnswerStream
from mindspeed_lora.inference.text_filters import OPEN, StopFilter, ThinkFilter, without_thinking
from mindspeed_lora.parallel.collectives import broadcast_object

PROMPT = "You >> "
QUIT = ("q", "quit", "exit")
CLEAR = ("clear", "new")
_WAIT, _END = "wait", "end"
"""What rank 0 tells the others when it has no :class:`Request` for them."""
_TAIL = 8
"""Tokens at the end of a prompt that are looked at for an opened ``<think>``."""
_LONGEST_SILENCE = 60.0
"""Seconds between two signs of life to the ranks that wait while a person thinks."""


@dataclass
class Conversation:
    """What was said, as far as the model is told again."""

    plan: InferencePlan
    turns: list[tuple[str, str]] = field(default_factory=list)
    """Question and answer of each earlier turn."""

    def request(self, question: str, stream: int) -> Request:
        """The request for the answer to a question; turns for which there is no room are forgotten.

        Raises:
            Refused: the question alone is too long, or has a token that the model does not have.
        """
        limit = self.plan.limit
        while True:
            tokens = self.plan.chat_encoder.encode_conversation(self._messages(question))
            fits = limit.room(len(tokens)) >= min(limit.max_new_tokens, limit.longest // 2)
            if fits or not self.turns:
                break
            self.turns.pop(0)
        check_tokens(tokens, self.plan.tokenizer, self.plan.shape.vocab_size)
        if limit.room(len(tokens)) < 1:
            raise Refused(
                f"your message has {len(tokens)} tokens, but {limit.reason} leaves no room for an answer; "
                "say it shorter"
            )
        return Request(tuple(tokens), limit.room(len(tokens)), stream)

    def add(self, question: str, answer: str) -> None:
        """Keeps a turn, and of the earlier ones as many as ``--history-turns`` says."""
        kept = self.plan.job.inference.history_turns
        self.turns = [*self.turns, (question, answer)][-kept:] if kept else []

    def _messages(self, question: str) -> list[Message]:
        messages: list[Message] = []
        for asked, answered in self.turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return [*messages, {"role": "user", "content": question}]


def chat(session: InferenceSession) -> None:
    """Answers until the person leaves or standard input ends. Rank 0 reads and writes for all."""
    groups = session.groups
    if not groups.is_main:
        _follow(session)
        return
    patience = min(_LONGEST_SILENCE, groups.timeout.total_seconds() / 4)
    lines = StandardInput(alone=groups.world_size == 1, patience=patience)
    conversation = Conversation(session.plan)
    print(f"{', '.join(QUIT)}: leave; {', '.join(CLEAR)}: start anew", flush=True)
    turn = 0
    while (question := _question(session, lines, conversation)) is not None:
        try:
            request = conversation.request(question, stream=turn)
        except Refused as error:
            print(f"{error}\n", flush=True)
            continue
        broadcast_object(request, groups)
        conversation.add(question, _say(session, request))
        turn += 1
    broadcast_object(_END, groups)


def _follow(session: InferenceSession) -> None:
    """What the ranks other than 0 do: their part of each answer."""
    while (order := _order(session)) != _END:
        if isinstance(order, Request):
            session.generator.generate([order], session.plan.choice(CHAT))


def _order(session: InferenceSession) -> Request | str:
    """What rank 0 says next."""
    return broadcast_object(_WAIT, session.groups)


def _question(session: InferenceSession, lines: StandardInput, conversation: Conversation) -> str | None:
    """The next thing that is said and is no command; None to leave."""

    def waiting() -> None:
        broadcast_object(_WAIT, session.groups)

    while (line := lines.line(PROMPT, waiting)) is not None:
        word = line.strip()
        if word.lower() in QUIT:
            return None
        if word.lower() in CLEAR:
            conversation.turns.clear()
            print("(a new conversation)\n", flush=True)
        elif word:
            return line
    print(flush=True)
    return None


def _say(session: InferenceSession, request: Request) -> str:
    """Generates one answer and shows it as it comes; returns its text without the thinking."""
    plan = session.plan
    stream = AnswerStream(plan.tokenizer, plan.stop)
    ended = StopFilter(plan.stop.words.words if plan.stop.words is not None else ())
    prompt = str(plan.tokenizer.decode(list(request.tokens[-_TAIL:])))
    inside = prompt.rstrip().endswith(OPEN)
    thinking = ThinkFilter(plan.job.inference.hide_thinking, inside)
    for answers in session.generator.stream([request], plan.choice(CHAT)):
        done = answers[0].done
        shown = thinking.more(ended.more(stream.more(answers[0]), done), done)
        print(shown, end="", flush=True)
    print("\n", flush=True)
    return without_thinking(session.text(answers[0]), inside)
