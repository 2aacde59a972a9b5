"""Token after token through the pipeline stages, for a batch of prompts.

Every rank runs the same loop. A stage receives the hidden states of the new tokens from the one before; the last
one chooses, and its choice goes to all ranks of the replica, so that each of them knows when a row has ended.

Replicas of a model whose experts are cut over more ranks than one replica has (expert parallelism beyond TP) meet in
every layer: each goes on until all have ended, and one that has nothing to answer takes part with a stand-in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from mindspeed_lora.device import current_device
from mindspeed_lora.inference.kv_cache import KeyValueCache
from mindspeed_lora.inference.sampling import TokenChoice, uniform
from mindspeed_lora.inference.stopping import StopRule
from mindspeed_lora.models.gpt import GPTModel
from mindspeed_lora.parallel.collectives import all_reduce_max, broadcast, receive, send
from mindspeed_lora.parallel.groups import ParallelGroups

Tensor = torch.Tensor


@dataclass(frozen=True)
class Request:
    """One prompt."""

    tokens: tuple[int, ...]
    max_new_tokens: int
    stream: int = 0
    """Tells the random draws of one prompt from those of another."""


_STAND_IN = Request((0,), 1)
"""What a replica computes that has nothing to answer while others do."""


@dataclass
class Answer:
    """One prompt's answer as far as it is known."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    """With the end token, where there is one."""
    ending: int = 0
    """How many of the tokens are the stop, which is no part of the text."""

    @property
    def done(self) -> bool:
        """Nothing is added any more."""
        return self.ending > 0 or len(self.tokens) >= self.request.max_new_tokens

    @property
    def text_tokens(self) -> list[int]:
        """The tokens without the stop."""
        return self.tokens[: len(self.tokens) - self.ending]


class Generator:
    """Generates with a model that is cut over the ranks of the groups."""

    def __init__(self, model: GPTModel, groups: ParallelGroups, stop: StopRule) -> None:
        self.model = model.eval()
        self.groups = groups
        self.stop = stop
        # Expert ranks are neighbours, as tensor-parallel ones are.
        self.meets_others = groups.tp_size % groups.experts.size != 0
        """Whether replicas share experts, so that all must take the same steps."""

    def generate(self, requests: Sequence[Request], choice: TokenChoice) -> list[Answer]:
        """The whole answers, in the order of the requests, of which a replica may have none."""
        if not requests and not self.meets_others:
            return []
        *_, answers = self.stream(requests or [_STAND_IN], choice)
        return answers if requests else []

    @torch.inference_mode()
    def stream(self, requests: Sequence[Request], choice: TokenChoice) -> Iterator[list[Answer]]:
        """Yields the answers, always the same objects, each time that those not done have one more token."""
        answers = [Answer(request) for request in requests]
        tokens, padding = _left_padded([request.tokens for request in requests])
        steps = self._most(max(request.max_new_tokens for request in requests))
        cache = KeyValueCache(padding, capacity=tokens.size(1) + steps - 1)
        with cache.attached(self.model):
            while self._most(not all(answer.done for answer in answers)):
                logits = self._forward(tokens, cache.advance(tokens.size(1)))
                chosen = self._choose(logits, answers, choice)
                for answer, token in zip(answers, chosen.tolist(), strict=True):
                    if not answer.done:
                        answer.tokens.append(token)
                        answer.ending = self.stop.ending(answer.tokens)
                yield answers
                tokens = chosen.unsqueeze(1)

    def _most(self, value: int) -> int:
        """The value, or the largest among replicas that take the same steps."""
        if not self.meets_others:
            return value
        most = torch.tensor([value], dtype=torch.int64, device=current_device())
        return int(all_reduce_max(most, self.groups.dp_group))

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor | None:
        """Logits ``[b, v]`` after the last of ``tokens [b, s]`` on the last stage, None on the others."""
        groups, config = self.groups, self.model.config
        if not groups.is_first_stage:
            size = (tokens.size(1), tokens.size(0), config.hidden_size)
            hidden = torch.empty(size, dtype=config.params_dtype, device=tokens.device)
            self.model.set_input_tensor(receive(hidden, groups.pp_group, groups.pp_rank - 1))
        output = self.model(tokens, positions=positions, last_only=True)
        if groups.is_last_stage:
            return output.squeeze(0)
        send(output, groups.pp_group, groups.pp_rank + 1)
        return None

    def _choose(self, logits: Tensor | None, answers: Sequence[Answer], choice: TokenChoice) -> Tensor:
        """The next token of each row ``[b]``: chosen by one rank of the last stage, known to all."""
        groups = self.groups
        chosen = torch.empty(len(answers), dtype=torch.int64, device=current_device())
        if logits is not None and groups.tp_rank == 0:
            seen = [(*answer.request.tokens, *answer.tokens) for answer in answers]
            draws = [uniform(choice.seed, answer.request.stream, len(answer.tokens)) for answer in answers]
            chosen = choice.choose(logits, seen, draws)
        # Ranks of the replica are ordered by stage, within a stage by tensor-parallel rank.
        return broadcast(chosen, groups.model_group, (groups.pp_size - 1) * groups.tp_size)


def _left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The prompts as ``[b, s]`` ending together, and the number of padding slots of each row ``[b]``."""
    longest = max(len(row) for row in rows)
    padding = [longest - len(row) for row in rows]
    # What stands in a padding slot is never attended to.
    tokens = [[0] * empty + list(row) for empty, row in zip(padding, rows, strict=True)]
    return (
        torch.tensor(tokens, dtype=torch.int64, device=current_device()),
        torch.tensor(padding, dtype=torch.int64, device=current_device()),
    )
