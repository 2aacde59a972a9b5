"""One training sample, and what has no loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

IGNORE_INDEX = -100
"""The label of a token that carries no loss."""


@dataclass(frozen=True)
class Sample:
    """Tokens and, for each, the label that the position before it is trained to predict."""

    input_ids: np.ndarray[Any, Any]
    """int64 ``[n]``."""
    labels: np.ndarray[Any, Any]
    """int64, unshifted, -100 where there is no loss: ``[n]``, or ``[n + 1]`` where the token that follows the
    last one is known and is its target."""
    sub_rows: tuple[int, ...] | None = None
    """Lengths of the parts that attention does not cross, summing to n; None: it is one."""
    position_ids: np.ndarray[Any, Any] | None = None
    """int64 ``[n]``; None: they start anew in each sub-row."""
    weights: np.ndarray[Any, Any] | None = None
    """float32, as long as ``labels``: the weight of each label's loss in the mean; None: all are 1."""

    def positions(self) -> np.ndarray[Any, Any]:
        """Position ids, int64 ``[n]``."""
        if self.position_ids is not None:
            return self.position_ids
        parts = self.sub_rows or (len(self.input_ids),)
        return np.concatenate([np.arange(length, dtype=np.int64) for length in parts])


def number_trained(labels: np.ndarray[Any, Any]) -> int:
    """How many positions have a target in unshifted ``labels`` ``[n]``; none predicts the first."""
    return int(np.count_nonzero(labels[1:] != IGNORE_INDEX))
