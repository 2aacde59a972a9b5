"""Plain text as one long stream of tokens, cut into windows of the sequence length.

The documents are put in an order that depends on the seed alone and joined; window i holds the tokens from
``i · seq_length`` on, and each token's target is the one that follows it, the last one's too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindspeed_lora.data.indexed_dataset import token_dataset
from mindspeed_lora.data.sample import IGNORE_INDEX, Sample
from mindspeed_lora.data.sampling import seeded_permutation
from mindspeed_lora.errors import Refused


@dataclass(frozen=True, kw_only=True)
class EndOfDocument:
    """What happens behind the token that ends a document inside of a window: Megatron's three switches."""

    token_id: int
    reset_attention_mask: bool = False
    """Attention does not look back beyond it."""
    reset_position_ids: bool = False
    """Positions start anew."""
    mask_loss: bool = False
    """It predicts nothing; else it predicts the first token of the next document."""

    def sample(self, stream: np.ndarray) -> Sample:
        """The sample of a window's tokens and the one that follows them, int64 ``[n + 1]``."""
        tokens = stream[:-1]
        ends = np.flatnonzero(tokens == self.token_id) + 1
        lengths = np.diff(ends[ends < len(tokens)], prepend=0, append=len(tokens))
        labels = stream
        if self.mask_loss:
            labels = stream.copy()
            labels[ends] = IGNORE_INDEX
        if len(lengths) < 2 or not (self.reset_attention_mask or self.reset_position_ids):
            return Sample(tokens, labels)
        positions = np.arange(len(tokens))
        if self.reset_position_ids:
            positions -= np.repeat(np.cumsum(lengths) - lengths, lengths)
        return Sample(
            tokens, labels, tuple(lengths.tolist()) if self.reset_attention_mask else None, positions
        )


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
        end: EndOfDocument | None = None,
    ) -> None:
        self.prefix = str(prefix)
        self.seq_length = seq_length
        self.end = end
        self._tokens = token_dataset(prefix)
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
        return Sample(stream[:-1], stream) if self.end is None else self.end.sample(stream)

    def ends_documents_with(self, token_id: int, documents: int = 256) -> bool:
        """Whether any of the first ``documents`` documents ends with the token."""
        chosen = (self._tokens[int(document)] for document in self._documents[:documents])
        return any(len(tokens) and int(tokens[-1]) == token_id for tokens in chosen)

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
