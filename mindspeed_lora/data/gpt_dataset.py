"""Plain text as one long stream of tokens, cut into windows of the sequence length.

The documents are put in an order that depends on the seed alone and joined; window i holds the tokens from
``i · seq_length`` on, and each token's target is the one that follows it, the last one's too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mindspeed_lora.data.indexed_dataset import IndexedDataset
from mindspeed_lora.data.sample import Sample
from mindspeed_lora.data.sampling import seeded_permutation
from mindspeed_lora.errors import Refused


class GptDataset:
    """Next-token samples over the documents of ``{prefix}.bin``, all of ``seq_length`` tokens.

    A corpus that does not fill one window gives a single shorter sample.
    """

    def __init__(
        self,
        prefix: str | Path,
        seq_length: int,
        documents: range | None = None,
        seed: int = 1234,
        shuffle: bool = True,
    ) -> None:
        self.prefix = str(prefix)
        self.seq_length = seq_length
        self._tokens = IndexedDataset(prefix)
        chosen = np.arange(len(self._tokens))
        if documents is not None:
            chosen = chosen[documents.start : documents.stop]
        self._documents = chosen[seeded_permutation(len(chosen), seed)] if shuffle else chosen
        lengths = self._tokens.sequence_lengths[self._documents].astype(np.int64)
        self._ends = np.cumsum(lengths)
        self._num_tokens = int(lengths.sum())
        if len(chosen) and self._num_tokens < 2:
            raise Refused(
                f"--data-path {prefix}: {self._num_tokens} tokens; at least 2 are needed to predict one"
            )

    def __len__(self) -> int:
        if self._num_tokens < 2:
            return 0
        return max((self._num_tokens - 1) // self.seq_length, 1)

    @property
    def longest(self) -> int:
        """Length of the longest sample."""
        return min(self.seq_length, max(self._num_tokens - 1, 0))

    def __getitem__(self, index: int) -> Sample:
        start = index * self.seq_length
        stream = self._read(start, min(start + self.seq_length + 1, self._num_tokens))
        return Sample(input_ids=stream[:-1], labels=stream)

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of the joined documents, int64 ``[stop - start]``."""
        parts = []
        position = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            document = int(self._documents[position])
            begin = int(self._ends[position]) - int(self._tokens.sequence_lengths[document])
            part = self._tokens.get(document, start - begin, stop - start)
            parts.append(part)
            start += len(part)
            position += 1
        return np.concatenate(parts).astype(np.int64)
