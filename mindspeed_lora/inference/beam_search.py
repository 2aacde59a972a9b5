"""Beam search, and its form with sampling: several answers to a prompt are followed at once.

Scores, finished answers and the end are those of transformers' ``generate`` (5.x), so that answers are equal token for
token. A beam's score is the sum of its tokens' log-probabilities; a finished answer of n tokens is ranked by its sum
/ n ^ ``length_penalty``. With sampling, continuations are drawn without replacement in proportion to their probability
(Gumbel-top-k, Kool et al. 2019, arXiv 1903.06059), by draws that depend on seed, prompt and step alone.

Letters: n beams, k continuations that are looked at in each step, v words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mindspeed_lora.device import current_device
from mindspeed_lora.inference.generator import STAND_IN, Answer, Generator, Request
from mindspeed_lora.inference.kv_cache import KeyValueCache
from mindspeed_lora.inference.sampling import TokenChoice, filter_logits, penalise_repetition
from mindspeed_lora.inference.stages import StagedModel
from mindspeed_lora.inference.stopping import StopRule
from mindspeed_lora.models.gpt import GPTModel
from mindspeed_lora.parallel.groups import ParallelGroups

Tensor = torch.Tensor

_OUT = -1.0e9
"""Added to the score of what is not to be taken: finite, so that such scores still compare."""


@dataclass(frozen=True, kw_only=True)
class BeamSettings:
    """How a search goes."""

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: str = "false"
    """``true``, ``false`` or ``never``: see ``--early-stopping``."""
    num_return_sequences: int = 1


class Beams:
    """The answers to one prompt: those that grow, and the best of those that have ended. On the CPU, on every rank."""

    def __init__(self, request: Request, settings: BeamSettings, stop: StopRule) -> None:
        n = settings.num_beams
        self.request = request
        self.settings = settings
        self.stop = stop
        self.num_kept = max(2, 1 + len(stop.sequences)) * n
        """Continuations that are looked at: were all of the best n ended, n others must be left to grow."""
        self.growing: list[tuple[int, ...]] = [()] * n
        # All beams are the prompt; only the first may be continued, or they would stay alike.
        self.scores = torch.full((n,), _OUT)
        self.scores[0] = 0.0
        self.ended: list[tuple[int, ...]] = [()] * n
        self.ended_scores = torch.full((n,), _OUT)
        self.has_ended = torch.zeros(n, dtype=torch.bool)
        self.done = False
        self._length = 0
        self._improvable = True

    @property
    def num_tokens(self) -> int:
        """Tokens of the beams that grow."""
        return self._length

    def take(self, scores: Tensor, parents: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """One step: continuations with their scores ``[k]``, best first, the beams they continue, and their tokens.

        Returns:
            Which beam each of the n beams that go on continues.
        """
        n, settings = self.settings.num_beams, self.settings
        self._length += 1
        answers = [(*self.growing[parent], token) for parent, token in zip(parents, tokens, strict=True)]
        at_end = self._length >= self.request.max_new_tokens
        ends = torch.tensor([at_end or self.stop.stops(answer) for answer in answers])
        running = scores + ends.float() * _OUT
        chosen = running.topk(n).indices
        self._keep_ended(scores, answers, ends)
        self.growing = [answers[i] for i in chosen.tolist()]
        self.scores = running[chosen]
        self._improvable = self._improvable and self._can_improve()
        full = bool(self.has_ended.all()) and settings.early_stopping == "true"
        self.done = not self._improvable or full or bool(ends.all())
        return [parents[i] for i in chosen.tolist()]

    def answers(self) -> list[Answer]:
        """The best ended answers, best first."""
        told = self.ended[: self.settings.num_return_sequences]
        return [Answer(self.request, list(tokens), self.stop.ending(tokens), True) for tokens in told]

    def _keep_ended(self, scores: Tensor, answers: list[tuple[int, ...]], ends: Tensor) -> None:
        """The best n of the ended answers so far and those that end now among the best n continuations."""
        n, settings = self.settings.num_beams, self.settings
        among_best = torch.arange(len(answers)) < n
        ranked = scores / (self._length**settings.length_penalty)
        if bool(self.has_ended.all()) and settings.early_stopping == "true":
            ranked = ranked + _OUT
        if not self._improvable:
            ranked = ranked + _OUT
        ranked = ranked + (~(ends & among_best)).float() * _OUT
        merged = torch.cat([self.ended_scores, ranked])
        best = merged.topk(n).indices
        both = [*self.ended, *answers]
        self.has_ended = torch.cat([self.has_ended, ends & among_best])[best]
        self.ended = [both[i] for i in best.tolist()]
        self.ended_scores = merged[best]

    def _can_improve(self) -> bool:
        """Whether the best growing beam may still overtake the worst ended answer.

        Longer answers are ranked higher with a positive penalty: ``never`` grants it the most tokens, the others the
        tokens that it has.
        """
        settings = self.settings
        never = settings.early_stopping == "never" and settings.length_penalty > 0.0
        length = self.request.max_new_tokens if never else self._length
        best = self.scores[0] / (length**settings.length_penalty)
        worst = torch.where(self.has_ended, self.ended_scores.min(), torch.tensor(_OUT))
        return bool((best > worst).any())


class BeamSearch:
    """Searches with a model that is cut over the ranks of the groups."""

    def __init__(self, model: GPTModel, groups: ParallelGroups, stop: StopRule) -> None:
        self.staged = StagedModel(model, groups)
        self.stop = stop
        self._one_beam = Generator(model, groups, stop)

    @torch.inference_mode()
    def answer(
        self,
        requests: Sequence[Request],
        choice: TokenChoice,
        settings: BeamSettings,
        stop: StopRule | None = None,
    ) -> list[list[Answer]]:
        """To each request the best answers, best first; a replica may have no requests.

        One beam is no search, as in transformers: it ends at the first end token, whatever could still overtake it.
        """
        if settings.num_beams == 1:
            return [[answer] for answer in self._one_beam.generate(requests, choice, stop or self.stop)]
        answers = []
        for number in range(self.staged.most(len(requests))):
            request = requests[number] if number < len(requests) else STAND_IN
            answers.append(self._search(Beams(request, settings, stop or self.stop), choice))
        return answers[: len(requests)]

    def _search(self, beams: Beams, choice: TokenChoice) -> list[Answer]:
        staged, n, prompt = self.staged, beams.settings.num_beams, beams.request.tokens
        steps = staged.most(beams.request.max_new_tokens)
        device = current_device()
        cache = KeyValueCache(
            torch.zeros(1, dtype=torch.int64, device=device), capacity=len(prompt) + steps - 1
        )
        tokens = torch.tensor([prompt], dtype=torch.int64, device=device)
        first = True
        with cache.attached(staged.model):
            while staged.most(not beams.done):
                if not first and staged.switch == len(prompt) + beams.num_tokens - 1 and not beams.done:
                    # The beams are now so long that the keys of all their tokens are rotated otherwise (longrope).
                    tokens = torch.tensor([[*prompt, *answer] for answer in beams.growing], device=device)
                    cache.restart()
                logits = staged.logits(tokens, cache.advance(tokens.size(1)))
                if first:
                    cache.select(torch.zeros(n, dtype=torch.int64, device=device))
                    logits = None if logits is None else logits.expand(n, -1)
                    first = False
                if beams.done:
                    # Other replicas go on, and meet this one in every layer.
                    tokens = torch.zeros((n, 1), dtype=torch.int64, device=device)
                    continue
                parents = beams.take(*self._propose(logits, beams, choice))
                cache.select(torch.tensor(parents, dtype=torch.int64, device=device))
                tokens = torch.tensor([[answer[-1]] for answer in beams.growing], device=device)
        return beams.answers()

    def _propose(
        self, logits: Tensor | None, beams: Beams, choice: TokenChoice
    ) -> tuple[Tensor, list[int], list[int]]:
        """Scores ``[k]`` on the CPU, beams and tokens of the continuations: found by one rank, known to all."""
        vocab_size, device = self.staged.model.shape.vocab_size, current_device()
        scores = torch.empty(beams.num_kept, dtype=torch.float32, device=device)
        places = torch.empty(beams.num_kept, dtype=torch.int64, device=device)
        if logits is not None and self.staged.decides:
            scores, places = _best(logits, beams, choice)
        scores, places = self.staged.from_decider(scores), self.staged.from_decider(places)
        flat = places.tolist()
        return scores.cpu(), [place // vocab_size for place in flat], [place % vocab_size for place in flat]


def _best(logits: Tensor, beams: Beams, choice: TokenChoice) -> tuple[Tensor, Tensor]:
    """Scores ``[k]`` and places ``[k]`` in ``[n · v]`` of the continuations of ``logits [n, v]``, best or drawn."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    if choice.repetition_penalty != 1.0:
        seen = [(*beams.request.tokens, *answer) for answer in beams.growing]
        log_probs = penalise_repetition(log_probs, seen, choice.repetition_penalty)
    if choice.do_sample:
        least = 1 + len(beams.stop.sequences)
        log_probs = filter_logits(log_probs, choice.temperature, choice.top_k, choice.top_p, max(2, least))
    total = (log_probs + beams.scores.to(logits.device).unsqueeze(1)).flatten()
    if not choice.do_sample:
        scores, places = total.topk(beams.num_kept)
        return scores, places
    noise = _gumbel(total.numel(), f"{choice.seed}/{beams.request.stream}/{beams.num_tokens}")
    places = (total.double() + noise.to(total.device)).topk(beams.num_kept).indices
    return total[places], places


def _gumbel(count: int, counter: str) -> Tensor:
    """``[count]`` float64 draws of the Gumbel distribution, the same for the same counter."""
    digest = hashlib.sha256(counter.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    uniform = torch.rand(count, dtype=torch.float64, generator=generator).clamp(min=1e-300)
    return -torch.log(-torch.log(uniform))
