"""Token after token through the pipeline stages, for a batch of prompts.

Every rank runs the same loop. The last stage chooses, and its choice goes to all ranks of the replica, so that each of
them knows when a row has ended. Replicas that meet in every layer (``stages.py``) go on until all have ended, and one
that has nothing to answer takes part with a stand-in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from mindspeed_lora.device import current_device
from mindspeed_lora.inference.kv_cache import KeyValueCache
from mindspeed_lora.inference.sampling import TokenChoice, uniform
from mindspeed_lora.inference.stages import StagedModel, left_padded
from mindspeed_lora.inference.stopping import StopRule
from mindspeed_lora.models.gpt import GPTModel
from mindspeed_lora.parallel.groups import ParallelGroups

Tensor = torch.Tensor


@dataclass(frozen=True)
class Request:
    """One prompt."""

    tokens: tuple[int, ...]
    max_new_tokens: int
    stream: int = 0
    """Tells the random draws of one prompt from those of another."""


STAND_IN = Request((0,), 1)
"""What a replica computes that has nothing to answer while others do."""


@dataclass
class Answer:
    """One prompt's answer as far as it is known."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    """With the end token, where there is one."""
    ending: int = 0
    """How many of the tokens are the stop, which is no part of the text."""
    stopped: bool = False
    """A stop was found: tokens at the end, or a word in the text."""

    @property
    def done(self) -> bool:
        """Nothing is added any more."""
        return self.stopped or len(self.tokens) >= self.request.max_new_tokens

    @property
    def text_tokens(self) -> list[int]:
        """The tokens without the stop."""
        return self.tokens[: len(self.tokens) - self.ending]


class Generator:
    """Generates with a model that is cut over the ranks of the groups."""

    def __init__(self, model: GPTModel, groups: ParallelGroups, stop: StopRule) -> None:
        self.staged = StagedModel(model, groups)
        self.stop = stop

    def generate(
        self, requests: Sequence[Request], choice: TokenChoice, stop: StopRule | None = None
    ) -> list[Answer]:
        """The whole answers, in the order of the requests, of which a replica may have none."""
        if not requests and not self.staged.meets_others:
            return []
        *_, answers = self.stream(requests or [STAND_IN], choice, stop)
        return answers if requests else []

    @torch.inference_mode()
    def stream(
        self, requests: Sequence[Request], choice: TokenChoice, stop: StopRule | None = None
    ) -> Iterator[list[Answer]]:
        """Yields the answers, always the same objects, each time that those not done have one more token.

        ``stop`` takes the place of the generator's own rule.
        """
        staged, stop = self.staged, stop or self.stop
        answers = [Answer(request) for request in requests]
        tokens, padding = left_padded([request.tokens for request in requests])
        steps = staged.most(max(request.max_new_tokens for request in requests))
        cache = KeyValueCache(padding, capacity=tokens.size(1) + steps - 1)
        read = [tokens]
        with cache.attached(staged.model):
            while staged.most(not all(answer.done for answer in answers)):
                if self._any_outgrows(answers):
                    tokens = torch.cat(read, dim=1)
                    cache.restart()
                logits = staged.logits(tokens, cache.advance(tokens.size(1)))
                chosen = self._choose(logits, answers, choice)
                for answer, token in zip(answers, chosen.tolist(), strict=True):
                    if not answer.done:
                        answer.tokens.append(token)
                        answer.ending = stop.ending(answer.tokens)
                        answer.stopped = stop.stops(answer.tokens)
                yield answers
                tokens = chosen.unsqueeze(1)
                read.append(tokens)

    def _any_outgrows(self, answers: Sequence[Answer]) -> bool:
        """Whether with its last token a row becomes so long that the keys of all its tokens are rotated otherwise."""
        switch = self.staged.switch
        return switch is not None and any(
            not answer.done
            and answer.tokens
            and len(answer.request.tokens) + len(answer.tokens) == switch + 1
            for answer in answers
        )

    def _choose(self, logits: Tensor | None, answers: Sequence[Answer], choice: TokenChoice) -> Tensor:
        """The next token of each row ``[b]``: chosen by one rank of the last stage, known to all."""
        chosen = torch.empty(len(answers), dtype=torch.int64, device=current_device())
        if logits is not None and self.staged.decides:
            seen = [(*answer.request.tokens, *answer.tokens) for answer in answers]
            draws = [uniform(choice.seed, answer.request.stream, len(answer.tokens)) for answer in answers]
            chosen = choice.choose(logits, seen, draws)
        return self.staged.from_decider(chosen)
