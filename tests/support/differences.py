"""How far two trainings of one job are apart, and how far they may be.

Tolerances, with what they allow for. Both sides compute in fp32, whose unit is 6e-8; a figure after 20 steps is
the end of thousands of roundings in a row.

- ``LOGITS``: absolute, of logits of size 10; observed up to 3e-5.
- ``LOSS``: each of 20 steps against PEFT. The reference itself in fp32 and in fp64 differs by 5e-7.
- ``LOSS_BETWEEN_LAYOUTS``: the same program, sums in another order: 5e-7 a side, with margin.
- ``GRADIENT``: norm of the difference over the norm, of each A and B. Sums that cancel leave 5e-6.
- ``GRAD_NORM``: of each of 20 steps; in a late one the two sides have trained to slightly different parameters.
- ``FACTOR``: norm of the difference over the norm, of each trained tensor after 20 steps. Adam divides a gradient
  by its own size, so that the relative error of a small one enters whole; observed up to 7e-7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tests.support.reference import ReferenceRecord
from tests.support.shards import largest_relative_difference

LOGITS = 1e-4
LOSS = 1e-5
LOSS_BETWEEN_LAYOUTS = 2e-6
GRADIENT = 1e-5
GRAD_NORM = 1e-5
FACTOR = 5e-6


@dataclass(frozen=True)
class Differences:
    """The largest difference of each kind, or the largest that is allowed."""

    logits: float = LOGITS
    loss: float = LOSS
    grad_norm: float = GRAD_NORM
    gradient: float = GRADIENT
    factor: float = FACTOR

    @classmethod
    def between(cls, found: ReferenceRecord, expected: ReferenceRecord) -> Differences:
        """Of two records of the same job."""
        return cls(
            logits=largest_logit_difference(
                [*found.start_logits, *found.end_logits], [*expected.start_logits, *expected.end_logits]
            ),
            loss=largest_ratio(found.losses, expected.losses),
            grad_norm=largest_ratio(found.grad_norms, expected.grad_norms),
            gradient=largest_relative_difference(found.gradients, expected.gradients),
            factor=largest_relative_difference(found.end, expected.end),
        )

    def __str__(self) -> str:
        return "  ".join(f"{name} {value:.1e}" for name, value in vars(self).items())

    def check(self) -> None:
        """Raises AssertionError, with all figures, where one is above its tolerance."""
        allowed = Differences()
        above = [name for name, limit in vars(allowed).items() if not getattr(self, name) <= limit]
        assert not above, f"above tolerance: {', '.join(above)}; found {self}; allowed {allowed}"


def largest(several: Sequence[Differences]) -> Differences:
    """The largest of each kind."""
    return Differences(
        *(max(values) for values in zip(*(vars(one).values() for one in several), strict=True))
    )


def largest_ratio(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference of two lists of the same length."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def largest_logit_difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Largest absolute difference of rows ``[s, v]``."""
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
