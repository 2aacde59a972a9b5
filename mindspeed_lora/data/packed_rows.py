"""Rows that are kept on disk until all of them are known, and then put together to packed rows of one length.

Shapes: n tokens of one row, s tokens of a packed row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_lora.data.atomic_output import temporary_sibling
from mindspeed_lora.data.packing import Packing, best_fit_decreasing
from mindspeed_lora.data.sample import IGNORE_INDEX

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class PackFormat:
    """What a packed row looks like."""

    seq_length: int
    """Its length s: it is filled up with padding that carries no loss."""
    pad_token_id: int
    neat: bool
    """Whether the attention mask counts the rows inside, and no row predicts the first token of the next."""

    @property
    def name(self) -> str:
        """What :class:`~mindspeed_lora.data.prepared_info.PreparedInfo` calls it."""
        return "neat" if self.neat else "plain"

    def row(self, parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array, Array]:
        """Tokens, attention mask and labels, int32 ``[s]``, of rows of tokens and labels ``[n]``."""
        input_ids = np.full(self.seq_length, self.pad_token_id, dtype=np.int32)
        attention_mask = np.zeros(self.seq_length, dtype=np.int32)
        labels = np.full(self.seq_length, IGNORE_INDEX, dtype=np.int32)
        start = 0
        for number, (tokens, targets) in enumerate(parts, start=1):
            stop = start + len(tokens)
            input_ids[start:stop] = tokens
            attention_mask[start:stop] = number if self.neat else 1
            labels[start:stop] = targets
            if self.neat:
                # Readers shift labels over the whole row: the token before must not predict this one.
                labels[start] = IGNORE_INDEX
            start = stop
        return input_ids, attention_mask, labels


class RowSpool:
    """A temporary file of rows in input order, read back in packing order."""

    def __init__(self, target: Path) -> None:
        """``target`` names the file; it never gets this name itself."""
        self._path = temporary_sibling(target)
        self._stream = self._path.open("wb")
        self.lengths: list[int] = []

    def add(self, input_ids: Array, labels: Array) -> None:
        """Append one row, int32 ``[n]`` each."""
        for values in (input_ids, labels):
            self._stream.write(values.astype(np.int32, copy=False).tobytes())
        self.lengths.append(len(input_ids))

    def packed(self, form: PackFormat) -> Iterator[tuple[Array, Array, Array]]:
        """The packed rows, in packing order: tokens, attention mask, labels, int32 ``[s]``."""
        self._stream.flush()
        packing: Packing = best_fit_decreasing(self.lengths, form.seq_length)
        values = np.memmap(self._path, dtype=np.int32, mode="r") if self.lengths else np.zeros(0, np.int32)
        # A row is its tokens and then its labels.
        ends = 2 * np.cumsum(np.asarray(self.lengths, dtype=np.int64))
        for rows in packing:
            spans = [(int(ends[row]) - 2 * self.lengths[row], self.lengths[row]) for row in rows]
            yield form.row(
                [(values[at : at + length], values[at + length : at + 2 * length]) for at, length in spans]
            )

    def close(self) -> None:
        """Remove the file."""
        self._stream.close()
        self._path.unlink(missing_ok=True)
