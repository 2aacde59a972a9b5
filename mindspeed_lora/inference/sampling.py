"""How the next token is chosen: the likeliest one, or a draw from the filtered distribution.

The filters are those of transformers' ``generate``, in its order: repetition penalty, temperature, top-k, top-p.
A draw is a function of (seed, prompt, position) alone, so that neither layout nor batch changes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class TokenChoice:
    """The rule by which tokens are chosen."""

    do_sample: bool
    temperature: float = 1.0
    top_k: int = 0
    """Choose among this many likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that are there already, and multiplies the negative ones."""
    seed: int = 1234

    def choose(self, logits: Tensor, seen: Sequence[Sequence[int]], draws: Sequence[float]) -> Tensor:
        """One token a row.

        Args:
            logits: ``[b, v]``, of the model's own vocabulary.
            seen: the tokens of each row so far.
            draws: a number in [0, 1) for each row; not looked at unless ``do_sample``.

        Returns:
            ``[b]`` int64.
        """
        logits = logits.float()
        if self.repetition_penalty != 1.0:
            logits = penalise_repetition(logits, seen, self.repetition_penalty)
        if not self.do_sample:
            return logits.argmax(dim=-1)
        kept = filter_logits(logits, self.temperature, self.top_k, self.top_p)
        return draw(kept, torch.tensor(draws, dtype=torch.float64, device=logits.device))


def penalise_repetition(logits: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """The logits ``[b, v]`` with those of each row's ``seen`` tokens made less likely (arXiv 1909.05858)."""
    penalised = logits.clone()
    for row, tokens in enumerate(seen):
        index = torch.tensor(sorted(set(tokens)), device=logits.device)
        scores = logits[row, index]
        penalised[row, index] = torch.where(scores < 0, scores * penalty, scores / penalty)
    return penalised


def filter_logits(logits: Tensor, temperature: float, top_k: int, top_p: float, least: int = 1) -> Tensor:
    """``[b, v]`` float32 with −∞ where top-k or top-p (Holtzman et al. 2019, arXiv 1904.09751) drop a token.

    The ``least`` likeliest tokens of a row are never dropped.
    """
    logits = logits / temperature
    top_k = max(top_k, least) if top_k else 0
    if 0 < top_k < logits.size(-1):
        smallest = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p < 1.0:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        dropped[..., -least:] = False
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of the distribution function, in vocabulary order, at ``uniform [b]``: ``[b]`` int64."""
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    token = torch.searchsorted(cumulative, uniform.unsqueeze(1) * total, right=True)
    # A product rounded up to the total would lie behind the last token that has a probability.
    last = (cumulative < total).sum(dim=-1, keepdim=True)
    return torch.minimum(token, last).squeeze(1)


def uniform(seed: int, prompt: int, position: int) -> float:
    """A number in [0, 1) for one token of one prompt."""
    digest = hashlib.sha256(f"{seed}/{prompt}/{position}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53
