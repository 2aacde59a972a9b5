"""Log-likelihoods of continuations of a context, by as few forward passes as there must be.

The choices of a question share the pass over its prompt: the first token of each is scored by the logits behind it, the
others of all choices by one more pass over the prompt's keys and values. What all contexts begin with (solved examples
in front of each question) is computed once.

Every rank of the job calls with the same requests; replicas of the model take every n-th batch. Letters: b contexts of
a batch, c continuations, p tokens that are shared, s tokens of a context behind them, m tokens of a continuation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mindspeed_lora.device import current_device
from mindspeed_lora.inference.kv_cache import KeyValueCache
from mindspeed_lora.inference.stages import StagedModel, left_padded
from mindspeed_lora.models.attention import CoreAttention
from mindspeed_lora.models.gpt import GPTModel
from mindspeed_lora.parallel.collectives import gather_objects
from mindspeed_lora.parallel.groups import ParallelGroups

Tensor = torch.Tensor
Tokens = tuple[int, ...]

_SHORTEST_SHARED = 8
"""Tokens that all contexts must begin with for these to be computed apart."""
_LOGITS_BYTES = 256 << 20
"""Most that logits take in float32 at once."""


@dataclass(frozen=True)
class ScoreRequest:
    """A context and what may follow it: at least one token each."""

    context: Tokens
    continuations: tuple[Tokens, ...]


@dataclass(frozen=True)
class Score:
    """Of one continuation."""

    log_likelihood: float
    """Natural logarithm, summed over its tokens."""
    is_greedy: bool
    """Each of its tokens is the likeliest one."""


class Scorer:
    """Scores with a model that is cut over the ranks of the groups."""

    def __init__(self, model: GPTModel, groups: ParallelGroups, batch_size: int = 1) -> None:
        self.staged = StagedModel(model, groups)
        self.groups = groups
        self.batch_size = batch_size
        self._lengths: Tensor | None = None
        """How long the rows count as, where their rotation depends on it."""
        # A window counts slots: padding behind a shared beginning would be counted as positions.
        self._may_share = not any(
            isinstance(module, CoreAttention) and module.sliding_window for module in model.modules()
        )

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> list[list[Score]] | None:
        """The scores of each request's continuations, in order, on rank 0; None on the others. All ranks call.

        Where rotation depends on a row's length, a row is a context with one continuation less its last token, which
        is not read.
        """
        switch = self.staged.switch
        if switch is None:
            return self._score_all(requests)
        found: dict[tuple[int, int], Score] = {}
        told = True
        for are_long in (False, True):
            chosen: dict[int, list[int]] = {}
            for i, request in enumerate(requests):
                for j, tokens in enumerate(request.continuations):
                    if (len(request.context) + len(tokens) - 1 > switch) == are_long:
                        chosen.setdefault(i, []).append(j)
            places = [(i, j) for i, own in chosen.items() for j in own]
            part = [
                ScoreRequest(requests[i].context, tuple(requests[i].continuations[j] for j in own))
                for i, own in chosen.items()
            ]
            scores = self._score_all(part, switch + are_long)
            told = scores is not None
            found.update(zip(places, [score for row in scores or [] for score in row], strict=told))
        if not told:
            return None
        return [[found[i, j] for j in range(len(one.continuations))] for i, one in enumerate(requests)]

    def _score_all(
        self, requests: Sequence[ScoreRequest], length: int | None = None
    ) -> list[list[Score]] | None:
        """The same for rows that are rotated alike: as rows of ``length`` are."""
        self._lengths = None if length is None else torch.tensor([length], device=current_device())
        # The longest first: what does not fit shows at once, and a batch holds contexts of about one length.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].context))
        shared = self._shared_tokens(requests)
        beginning = self._beginning(requests[0].context[:shared]) if shared else None
        own: dict[int, list[Score]] = {}
        for batch, longer in self._turns(order, requests):
            taken = [requests[i] for i in batch] or [ScoreRequest((0,) * (shared + 1), ((0,),))]
            scores = self._score_batch(taken, shared, beginning, longer)
            if self.staged.decides:
                own.update(zip(batch, scores, strict=False))
        gathered = gather_objects(own, self.groups)
        if gathered is None:
            return None
        found: dict[int, list[Score]] = {}
        for part in gathered:
            found.update(part)
        return [found[i] for i in range(len(requests))]

    def _turns(self, order: list[int], requests: Sequence[ScoreRequest]) -> Iterator[tuple[list[int], bool]]:
        """This replica's batches, and whether any replica's batch of that turn has continuations of several tokens.

        A replica that has no batch in a turn gets an empty one where all must take part.
        """
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        size, rank, meets = self.groups.dp_size, self.groups.dp_rank, self.staged.meets_others
        for first in range(0, len(batches), size):
            turn = batches[first : first + size]
            own = turn[rank] if rank < len(turn) else []
            looked_at = turn if meets else [own]
            longer = any(
                len(tokens) > 1 for batch in looked_at for i in batch for tokens in requests[i].continuations
            )
            if own or meets:
                yield own, longer

    def _shared_tokens(self, requests: Sequence[ScoreRequest]) -> int:
        """How many tokens all contexts begin with, each of them having more; 0 where that is not worth a pass."""
        if not self._may_share or len(requests) < 2:
            return 0
        # The first and the last of the sorted contexts differ where any two do.
        least, most = (extreme(request.context for request in requests) for extreme in (min, max))
        shortest = min(len(request.context) for request in requests)
        shared = 0
        while shared < shortest - 1 and least[shared] == most[shared]:
            shared += 1
        return shared if shared >= _SHORTEST_SHARED else 0

    def _beginning(self, tokens: Tokens) -> KeyValueCache:
        """Keys and values of what all contexts begin with."""
        device = current_device()
        cache = KeyValueCache(torch.zeros(1, dtype=torch.int64, device=device), capacity=len(tokens))
        with cache.attached(self.staged.model):
            rows = torch.tensor([tokens], dtype=torch.int64, device=device)
            self.staged.logits(rows, cache.advance(len(tokens)), self._lengths)
        return cache

    def _score_batch(
        self, batch: Sequence[ScoreRequest], shared: int, beginning: KeyValueCache | None, longer: bool
    ) -> list[list[Score]]:
        """The scores of a batch on the rank that decides; elsewhere what they are does not matter."""
        tokens, padding = left_padded([request.context[shared:] for request in batch])
        longest = max((len(one) for request in batch for one in request.continuations), default=1)
        capacity = shared + tokens.size(1) + longest
        cache = KeyValueCache(padding, capacity) if beginning is None else beginning.branch(padding, capacity)
        scores = _Scores(batch)
        with cache.attached(self.staged.model):
            logits = self.staged.logits(tokens, cache.advance(tokens.size(1)), self._lengths)
            if logits is not None:
                scores.add_first(logits)
            if longer:
                self._score_rest(cache, scores)
        return scores.result()

    def _score_rest(self, cache: KeyValueCache, scores: _Scores) -> None:
        """The second and further tokens of the continuations, by one pass over all of them."""
        device = current_device()
        rows = scores.longer() or [(0, 0, (0, 0))]
        cache.select(torch.tensor([row for row, _, _ in rows], dtype=torch.int64, device=device))
        longest = max(len(tokens) for _, _, tokens in rows)
        # Right padding: nothing real comes behind it.
        read = [[*tokens[:-1], *[0] * (longest - len(tokens))] for _, _, tokens in rows]
        given = torch.tensor(read, dtype=torch.int64, device=device)
        hidden = self.staged.hidden(given, cache.advance(longest - 1), self._lengths)
        if hidden is None:
            return
        size = max(1, _LOGITS_BYTES // 4 // (self.staged.model.shape.vocab_size * len(rows)))
        for first in range(0, hidden.size(0), size):
            logits = self.staged.model.logits(hidden[first : first + size])
            scores.add_rest(logits, first)


class _Scores:
    """The scores of one batch while they are summed up."""

    def __init__(self, batch: Sequence[ScoreRequest]) -> None:
        self._batch = batch
        self._sums = [[0.0] * len(request.continuations) for request in batch]
        self._greedy = [[True] * len(request.continuations) for request in batch]
        self._rows = [
            (row, choice, tokens)
            for row, request in enumerate(batch)
            for choice, tokens in enumerate(request.continuations)
            if len(tokens) > 1
        ]

    def longer(self) -> list[tuple[int, int, Tokens]]:
        """Row, number and tokens of the continuations of several tokens."""
        return self._rows

    def add_first(self, logits: Tensor) -> None:
        """The first tokens, by logits ``[b, v]``."""
        places = [
            (row, choice, 0, row, tokens[0])
            for row, request in enumerate(self._batch)
            for choice, tokens in enumerate(request.continuations)
        ]
        self._add(logits.unsqueeze(0), places)

    def add_rest(self, logits: Tensor, first: int) -> None:
        """Tokens ``first + 1`` … of the longer ones, by logits ``[m, c, v]``."""
        places = [
            (row, choice, position, number, tokens[first + position + 1])
            for number, (row, choice, tokens) in enumerate(self._rows)
            for position in range(min(logits.size(0), len(tokens) - 1 - first))
        ]
        self._add(logits, places)

    def result(self) -> list[list[Score]]:
        """Of each request the scores of its continuations."""
        return [
            [Score(total, greedy) for total, greedy in zip(sums, flags, strict=True)]
            for sums, flags in zip(self._sums, self._greedy, strict=True)
        ]

    def _add(self, logits: Tensor, places: list[tuple[int, int, int, int, int]]) -> None:
        """Adds what ``logits [m, c, v]`` say of (row, choice, position, number, token)."""
        if not places:
            return
        logits = logits.float()
        index = torch.tensor(places, dtype=torch.int64, device=logits.device)
        positions, numbers, tokens = index[:, 2], index[:, 3], index[:, 4]
        chosen = logits.log_softmax(dim=-1)[positions, numbers, tokens].double().tolist()
        likeliest = (logits.argmax(dim=-1)[positions, numbers] == tokens).tolist()
        for (row, choice, *_), value, greedy in zip(places, chosen, likeliest, strict=True):
            self._sums[row][choice] += value
            self._greedy[row][choice] = self._greedy[row][choice] and greedy
