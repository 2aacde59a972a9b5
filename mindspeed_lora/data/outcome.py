"""What became of the rows of a chunk, in a form that is cheap to send from a worker to the process that writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of one row."""

    documents: tuple[Array, ...] = ()
    """int32 ``[n]`` for each data set that is written; none for a dropped row."""
    num_loss_tokens: int = 0
    was_cut: bool = False
    weights: Array | None = None
    """float32 ``[n]``: the weights of the labels; None: all are 1."""
    reason: str | None = None
    """Why the row was dropped."""
    problem: str | None = None
    """A sentence on what is wrong with a row that is broken."""
    num_tokens: int | None = None
    """Tokens of the row, where they are not those of its first document."""


class Outcomes(list[Outcome]):
    """Those of a chunk of rows. Pickled, all documents are one array: thousands of small ones cost far more."""

    def __reduce__(self) -> tuple[Callable[..., Outcomes], tuple[Any, ...]]:
        documents = [document for outcome in self for document in outcome.documents]
        facts = [
            (
                *(len(outcome.documents), outcome.num_loss_tokens, outcome.was_cut, outcome.weights),
                *(outcome.reason, outcome.problem, outcome.num_tokens),
            )
            for outcome in self
        ]
        ids = np.concatenate(documents) if documents else np.zeros(0, dtype=np.int32)
        return _unpacked, (ids, [len(document) for document in documents], facts)


def _unpacked(ids: Array, lengths: Sequence[int], facts: Sequence[tuple[Any, ...]]) -> Outcomes:
    outcomes = Outcomes()
    start, remaining = 0, iter(lengths)
    for count, *others in facts:
        documents = []
        for _ in range(count):
            length = next(remaining)
            documents.append(ids[start : start + length])
            start += length
        outcomes.append(Outcome(tuple(documents), *others))
    return outcomes
