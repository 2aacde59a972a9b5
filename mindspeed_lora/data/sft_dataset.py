"""Instruction rows prepared as three indexed datasets: tokens, attention mask and labels.

Files: ``{prefix}_packed_{input_ids|attention_mask|labels}_document.{bin,idx}``; labels are unshifted and as
long as the tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mindspeed_lora.data.indexed_dataset import IndexedDataset
from mindspeed_lora.data.overlong import kept_positions
from mindspeed_lora.data.sample import Sample
from mindspeed_lora.errors import Refused

PACKED_KEYS = ("input_ids", "attention_mask", "labels")


def packed_prefix(prefix: str | Path, key: str) -> str:
    """The indexed dataset's own prefix for one of :data:`PACKED_KEYS`."""
    return f"{prefix}_packed_{key}_document"


class SftDataset:
    """The rows of a range of documents, none longer than ``seq_length``.

    Longer rows are cut or dropped by ``overlong``; item i is the i-th row that is kept.
    """

    def __init__(
        self, prefix: str | Path, seq_length: int, overlong: str = "truncate", documents: range | None = None
    ) -> None:
        self.prefix = str(prefix)
        self.seq_length = seq_length
        self.overlong = overlong
        _check_prefix(self.prefix)
        self._input_ids = IndexedDataset(packed_prefix(prefix, "input_ids"))
        self._labels = IndexedDataset(packed_prefix(prefix, "labels"))
        if not np.array_equal(self._input_ids.sequence_lengths, self._labels.sequence_lengths):
            raise Refused(
                f"--data-path {prefix}: the rows of input_ids and labels have different lengths; "
                "the files are of different runs, prepare the data again"
            )
        self._documents = np.arange(len(self._input_ids))
        if documents is not None:
            self._documents = self._documents[documents.start : documents.stop]
        self._drop_overlong()

    def _drop_overlong(self) -> None:
        lengths = self._input_ids.sequence_lengths[self._documents]
        overlong = np.flatnonzero(lengths > self.seq_length)
        dropped = [row for row in overlong if self._kept(int(self._documents[row])) is None]
        self._documents = np.delete(self._documents, dropped)
        self.num_dropped = len(dropped)
        """Rows that are longer than ``seq_length`` and were dropped."""
        self.num_cut = len(overlong) - len(dropped)
        """Rows that are longer than ``seq_length`` and are cut."""

    def _kept(self, document: int) -> np.ndarray | None:
        return kept_positions(self._labels[document], self.seq_length, self.overlong)

    def __len__(self) -> int:
        return len(self._documents)

    @property
    def longest(self) -> int:
        """Length of the longest row after cutting, 0 without rows."""
        lengths = self._input_ids.sequence_lengths[self._documents]
        return min(int(lengths.max()), self.seq_length) if len(lengths) else 0

    def __getitem__(self, index: int) -> Sample:
        document = int(self._documents[index])
        input_ids, labels = self._input_ids[document], self._labels[document]
        if len(input_ids) > self.seq_length:
            kept = self._kept(document)
            assert kept is not None, "rows that keep nothing were dropped at the start"
            input_ids, labels = input_ids[kept], labels[kept]
        return Sample(input_ids.astype(np.int64), labels.astype(np.int64))


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
        "expected the --output-prefix of preprocess_data.py"
    )
