"""Instruction rows prepared as three indexed datasets: tokens, attention mask and labels.

Files: ``{prefix}_packed_{input_ids|attention_mask|labels}_document.{bin,idx}``; labels are unshifted and as
long as the tokens. Where labels have other weights than 0 and 1, ``{prefix}_packed_loss_weights_document`` holds
them, as long again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mindspeed_lora.data.indexed_dataset import IndexedDataset, idx_path, token_dataset
from mindspeed_lora.data.overlong import kept_positions
from mindspeed_lora.data.sample import IGNORE_INDEX, Sample
from mindspeed_lora.errors import Failed, Refused

PACKED_KEYS = ("input_ids", "attention_mask", "labels")
WEIGHTS_KEY = "loss_weights"
"""The key of the weights, which are only there where they are needed."""


def packed_prefix(prefix: str | Path, key: str) -> str:
    """The indexed dataset's own prefix for one of :data:`PACKED_KEYS`, or :data:`WEIGHTS_KEY`."""
    return f"{prefix}_packed_{key}_document"


class SftDataset:
    """The rows of a range of documents, none longer than ``seq_length``.

    Longer rows are cut or dropped by ``overlong``; item i is the i-th row that is kept. The attention mask, where
    there is one and it may tell something (``packed``), is 0 on padding, which is left out at the end of a row, and
    counts the rows inside of a packed row (1, 2, 3 …), which become sub-rows.
    """

    def __init__(
        self,
        prefix: str | Path,
        seq_length: int,
        overlong: str = "truncate",
        documents: range | None = None,
        packed: bool = True,
    ) -> None:
        self.prefix = str(prefix)
        self.seq_length = seq_length
        self.overlong = overlong
        _check_prefix(self.prefix)
        self._input_ids = token_dataset(packed_prefix(prefix, "input_ids"))
        self._labels = self._beside("labels")
        mask = packed_prefix(prefix, "attention_mask")
        self._mask = self._beside("attention_mask") if packed and idx_path(mask).exists() else None
        weights = packed_prefix(prefix, WEIGHTS_KEY)
        self._weights = self._beside(WEIGHTS_KEY) if idx_path(weights).exists() else None
        self._documents = np.arange(len(self._input_ids))
        if documents is not None:
            self._documents = self._documents[documents.start : documents.stop]
        self._drop_overlong()

    def _beside(self, key: str) -> IndexedDataset:
        """The dataset of another key, whose rows must be as long as the tokens."""
        opened = IndexedDataset if key == WEIGHTS_KEY else token_dataset
        dataset = opened(packed_prefix(self.prefix, key))
        if not np.array_equal(self._input_ids.sequence_lengths, dataset.sequence_lengths):
            raise Refused(
                f"--data-path {self.prefix}: the rows of input_ids and {key} have different lengths; "
                "the files are of different runs, prepare the data again"
            )
        return dataset

    def _drop_overlong(self) -> None:
        lengths = self._input_ids.sequence_lengths[self._documents]
        overlong = [
            row for row in np.flatnonzero(lengths > self.seq_length).tolist() if self._is_overlong(row)
        ]
        dropped = [row for row in overlong if self._kept(int(self._documents[row])) is None]
        self._documents = np.delete(self._documents, dropped)
        self.num_dropped = len(dropped)
        """Rows that are longer than ``seq_length`` and were dropped."""
        self.num_cut = len(overlong) - len(dropped)
        """Rows that are longer than ``seq_length`` and are cut."""

    def _is_overlong(self, row: int) -> bool:
        return self._length(int(self._documents[row])) > self.seq_length

    def _length(self, document: int) -> int:
        """Tokens of a document up to the padding at its end."""
        if self._mask is None:
            return int(self._input_ids.sequence_lengths[document])
        real = np.flatnonzero(self._mask[document])
        return int(real[-1]) + 1 if len(real) else 0

    def _kept(self, document: int) -> np.ndarray | None:
        labels = self._labels[document][: self._length(document)]
        return kept_positions(labels, self.seq_length, self.overlong)

    def __len__(self) -> int:
        return len(self._documents)

    @property
    def longest(self) -> int:
        """Bound on the length of a row after cutting, 0 without rows."""
        lengths = self._input_ids.sequence_lengths[self._documents]
        return min(int(lengths.max()), self.seq_length) if len(lengths) else 0

    def tells_sub_rows(self, documents: int = 256) -> bool:
        """Whether any of the first ``documents`` rows is made of several, as its attention mask tells."""
        if self._mask is None:
            return False
        return any((self._mask[int(row)] > 1).any() for row in self._documents[:documents])

    def __getitem__(self, index: int) -> Sample:
        document = int(self._documents[index])
        kept = self._kept(document)
        assert kept is not None, "rows that keep nothing were dropped at the start"
        input_ids = self._input_ids[document][kept].astype(np.int64)
        labels = self._labels[document][kept].astype(np.int64)
        weights = None
        if self._weights is not None:
            weights = self._weights_of(document)[kept]
            labels[weights == 0] = IGNORE_INDEX
        if self._mask is None:
            return Sample(input_ids, labels, weights=weights)
        mask = self._mask[document][kept]
        starts = np.flatnonzero(np.diff(mask)) + 1
        if not len(starts):
            return Sample(input_ids, labels, weights=weights)
        # The token before a sub-row must not predict its first one.
        labels[starts] = IGNORE_INDEX
        labels[mask == 0] = IGNORE_INDEX
        sub_rows = tuple(np.diff(starts, prepend=0, append=len(mask)).tolist())
        return Sample(input_ids, labels, sub_rows, weights=weights)

    def _weights_of(self, document: int) -> np.ndarray:
        """The weights of a document's labels, float32 ``[n]``."""
        assert self._weights is not None
        weights = self._weights[document].astype(np.float32)
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise Failed(
                f"{self._weights.prefix}.bin: document {document} holds weights that are negative or not finite; "
                "prepare the data again"
            )
        return weights


def count_documents(prefix: str | Path) -> int:
    """Number of rows of prepared instruction data."""
    _check_prefix(str(prefix))
    return len(IndexedDataset(packed_prefix(prefix, "input_ids")))


def _check_prefix(prefix: str) -> None:
    if Path(packed_prefix(prefix, "input_ids") + ".idx").exists():
        return
    stem = (prefix.rpartition("_packed_")[0] or prefix).removesuffix("_packed")
    if stem != prefix and Path(packed_prefix(stem, "input_ids") + ".idx").exists():
        raise Refused(f"--data-path {prefix}: give the prefix without _packed…, that is {stem}")
    raise Refused(
        f"--data-path {prefix}: there is no {packed_prefix(prefix, 'input_ids')}.idx; "
        "expected the --output-prefix of preprocess_data.py, or raw rows"
    )
