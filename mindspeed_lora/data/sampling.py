"""In what order the samples of a run are taken from the documents."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

_WORD = 0xFFFFFFFF


def seeded_permutation(count: int, seed: int, epoch: int = 0) -> np.ndarray[Any, Any]:
    """A permutation of ``range(count)`` that depends on seed and epoch alone, int64 ``[count]``.

    ``RandomState`` is the generator whose streams NumPy promises never to change, so that a run that is
    resumed with another NumPy goes on in the same order.
    """
    words = np.asarray([seed & _WORD, (seed >> 32) & _WORD, epoch & _WORD], dtype=np.uint32)
    return np.random.RandomState(words).permutation(count)


def epoch_samples(num_documents: int, multiple: int = 1) -> int:
    """Samples of one epoch: as many as documents, and what fills them up to a multiple (``--padded-samples``)."""
    return -(-num_documents // multiple) * multiple


class SampleOrder:
    """Maps sample i of a run to a document; epoch after epoch, each with a permutation of its own.

    An epoch of ``multiple`` > 1 is filled up to a multiple of it with its first samples.

    Any sample can be asked for, so the position in the data is the number of consumed samples alone.
    """

    def __init__(self, num_documents: int, seed: int = 1234, shuffle: bool = True, multiple: int = 1) -> None:
        if num_documents < 1:
            raise ValueError(f"SampleOrder: {num_documents} documents; at least 1 is needed")
        self.num_documents = num_documents
        self.seed = seed
        self.shuffle = shuffle
        self.epoch_samples = epoch_samples(num_documents, multiple)
        # Two epochs: a global batch may reach from one into the next.
        self._permutation = functools.lru_cache(maxsize=2)(self._make_permutation)

    def _make_permutation(self, epoch: int) -> np.ndarray[Any, Any]:
        return seeded_permutation(self.num_documents, self.seed, epoch)

    def order(self, sample: int) -> int:
        """The document of sample ``sample`` ≥ 0 of the run."""
        epoch, position = divmod(sample, self.epoch_samples)
        position %= self.num_documents
        return int(self._permutation(epoch)[position]) if self.shuffle else position
