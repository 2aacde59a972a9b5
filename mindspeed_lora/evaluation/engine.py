"""One rank asks, all compute: rank 0 has the questions and the answers, the others follow its orders.

While rank 0 reads, judges or writes, a thread of it gives the others signs of life, or they would give up waiting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from mindspeed_lora.errors import Failed, Refused
from mindspeed_lora.inference.beam_search import BeamSearch, BeamSettings
from mindspeed_lora.inference.generator import Answer, Request
from mindspeed_lora.inference.prompts import check_tokens
from mindspeed_lora.inference.sampling import TokenChoice
from mindspeed_lora.inference.scoring import Score, Scorer, ScoreRequest
from mindspeed_lora.inference.stopping import StopRule, StopWords
from mindspeed_lora.models.gpt import GPTModel
from mindspeed_lora.parallel.collectives import broadcast_object, gather_objects
from mindspeed_lora.parallel.groups import ParallelGroups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WAIT, _END = "wait", "end"
"""Orders without work."""
_LONGEST_SILENCE = 60.0
"""Seconds between two signs of life."""


@dataclass(frozen=True)
class Generation:
    """The order to generate."""

    requests: tuple[Request, ...]
    choice: TokenChoice
    stop_words: tuple[str, ...] = ()
    num_beams: int = 1


@dataclass(frozen=True)
class _Scoring:
    """The order to score."""

    requests: tuple[ScoreRequest, ...]


@dataclass(frozen=True)
class _Task:
    """No work: the benchmark that all that follows is of."""

    name: str


class Engine:
    """A model that is asked on rank 0 and computes on all ranks.

    Args:
        model: this rank's part of it.
        groups: the ranks.
        tokenizer: finds stop words.
        ends: sequences of tokens that end every answer.
        batch_size: questions that a replica takes at once.
        mark: is told, on every rank, what begins.
    """

    def __init__(
        self,
        model: GPTModel,
        groups: ParallelGroups,
        tokenizer: PreTrainedTokenizerBase,
        ends: tuple[tuple[int, ...], ...],
        batch_size: int,
        mark: Callable[[str], None],
    ) -> None:
        self._mark = mark
        self.groups = groups
        self.tokenizer = tokenizer
        self._ends = ends
        self._batch_size = batch_size
        self._vocab_size = model.shape.vocab_size
        stop = StopRule(ends)
        self._scorer = Scorer(model, groups, batch_size)
        self._beams = BeamSearch(model, groups, stop)
        self._patience = min(_LONGEST_SILENCE, groups.timeout.total_seconds() / 4)
        self._spoken = time.monotonic()
        # Held while all ranks are at work: their collectives must not meet a sign of life.
        self._working = threading.Lock()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """On rank 0, around all that it asks: the others hear that it is alive, and are let go at the end."""
        ended = threading.Event()
        thread = threading.Thread(target=self._beat, args=(ended,), daemon=True)
        if self.groups.world_size > 1:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if thread.is_alive():
                thread.join()
        self._say(_END)

    def begin(self, task: str) -> None:
        """On rank 0: what is asked from here on is of this benchmark."""
        with self._working:
            self._say(_Task(task))
        self._mark(_phase(task))

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[Score]]:
        """On rank 0: the scores of each request's continuations.

        Raises:
            Failed: a token that the model does not have.
        """
        if not requests:
            return []
        order = _Scoring(tuple(requests))
        for request in requests:
            self._check(chain(request.context, *request.continuations))
        with self._working:
            self._say(order)
            scores = self._scorer.score(order.requests)
        assert scores is not None, "only rank 0 asks"
        return scores

    def generate(self, order: Generation) -> list[Answer]:
        """On rank 0: the answer to each request, without its stop words in :meth:`text`."""
        if not order.requests:
            return []
        for request in order.requests:
            self._check(request.tokens)
        with self._working:
            self._say(order)
            answers = self._generate(order)
        assert answers is not None, "only rank 0 asks"
        return answers

    def text(self, answer: Answer, stop_words: Sequence[str]) -> str:
        """What an answer says, up to its stop."""
        text = str(self.tokenizer.decode(answer.text_tokens, skip_special_tokens=True))
        words = StopWords.of(self.tokenizer, stop_words)
        return text if words is None else words.cut(text)

    def follow(self) -> None:
        """On the other ranks: does what rank 0 orders until it lets them go."""
        while (order := broadcast_object(_WAIT, self.groups)) != _END:
            if isinstance(order, _Scoring):
                self._scorer.score(order.requests)
            elif isinstance(order, Generation):
                self._generate(order)
            elif isinstance(order, _Task):
                self._mark(_phase(order.name))

    def _check(self, tokens: Iterable[int]) -> None:
        """The first question of a benchmark is checked beforehand; a later one may have a rarer character."""
        try:
            check_tokens(tokens, self.tokenizer, self._vocab_size)
        except Refused as error:
            raise Failed(str(error)) from error

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(self._patience / 4):
            # A failing job is told by the thread that asks.
            with suppress(RuntimeError), self._working:
                if time.monotonic() - self._spoken > self._patience / 2:
                    self._say(_WAIT)

    def _say(self, order: object) -> None:
        self._spoken = time.monotonic()
        broadcast_object(order, self.groups)

    def _generate(self, order: Generation) -> list[Answer] | None:
        """All answers on rank 0, None elsewhere."""
        words = StopWords.of(self.tokenizer, order.stop_words)
        stop = StopRule(self._ends, words)
        own: dict[int, Answer] = {}
        for batch in self._turns(order.requests):
            requests = [order.requests[i] for i in batch]
            settings = BeamSettings(num_beams=order.num_beams)
            answers = [told[0] for told in self._beams.answer(requests, order.choice, settings, stop)]
            own.update(zip(batch, answers, strict=True))
        gathered = gather_objects(own, self.groups)
        if gathered is None:
            return None
        found: dict[int, Answer] = {}
        for part in gathered:
            found.update(part)
        return [found[i] for i in range(len(order.requests))]

    def _turns(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """This replica's batches, longest prompts first; as many as any replica has, the last ones maybe empty."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens))
        turn = self._batch_size * self.groups.dp_size
        for first in range(0, len(order), turn):
            start = first + self.groups.dp_rank * self._batch_size
            yield order[start : start + self._batch_size]


def _phase(task: str) -> str:
    return f"--task {task}"
