"""Rows that are kept on disk until all of them are known, and then put together to packed rows of one length.

Shapes: n tokens of one row, s tokens of a packed row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_lora.data.growing_file import GrowingFile, Mark
from mindspeed_lora.data.packing import Packing, best_fit_decreasing
from mindspeed_lora.data.sample import IGNORE_INDEX

Array = np.ndarray[Any, Any]
Part = tuple[Array, Array, Array | None]
"""Tokens, labels and perhaps weights of a row, ``[n]`` each."""


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

    def row(self, parts: Sequence[Part]) -> tuple[tuple[Array, Array, Array], Array | None]:
        """Tokens, attention mask and labels, int32 ``[s]``, and float32 weights of the labels, of single rows."""
        input_ids = np.full(self.seq_length, self.pad_token_id, dtype=np.int32)
        attention_mask = np.zeros(self.seq_length, dtype=np.int32)
        labels = np.full(self.seq_length, IGNORE_INDEX, dtype=np.int32)
        weights = None
        if any(own is not None for _, _, own in parts):
            weights = np.ones(self.seq_length, dtype=np.float32)
        start = 0
        for number, (tokens, targets, own) in enumerate(parts, start=1):
            stop = start + len(tokens)
            input_ids[start:stop] = tokens
            attention_mask[start:stop] = number if self.neat else 1
            labels[start:stop] = targets
            if weights is not None and own is not None:
                weights[start:stop] = own
            if self.neat:
                # Readers shift labels over the whole row: the token before must not predict this one.
                labels[start] = IGNORE_INDEX
            start = stop
        return (input_ids, attention_mask, labels), weights


class RowSpool:
    """A temporary file of rows in input order, read back in packing order.

    A row is its tokens, its labels, and where it has weights these: two or three times n values of four bytes, which
    the file knows as the length 2 n, or 2 n + 1 with weights.
    """

    def __init__(self, target: Path, taken_from: int | None = None, mark: Mark | None = None) -> None:
        """``target`` names the file; it never gets this name itself. See ``GrowingFile`` for the others."""
        self._file = GrowingFile(target, taken_from, mark)

    def add(self, input_ids: Array, labels: Array, weights: Array | None = None) -> None:
        """Append one row: int32 ``[n]`` each, the weights float32."""
        content = (
            input_ids.astype(np.int32, copy=False).tobytes() + labels.astype(np.int32, copy=False).tobytes()
        )
        if weights is not None:
            content += weights.astype(np.float32, copy=False).tobytes()
        self._file.append(content, 2 * len(input_ids) + (weights is not None))

    def mark(self) -> Mark:
        """Puts the rows so far on the disk."""
        return self._file.mark()

    def packed(self, form: PackFormat) -> Iterator[tuple[tuple[Array, Array, Array], Array | None]]:
        """The packed rows, in packing order, as :meth:`PackFormat.row` gives them."""
        self._file.stream.flush()
        codes = np.frombuffer(self._file.lengths, dtype=np.int32).astype(np.int64)
        lengths, weighted = codes // 2, codes % 2
        packing: Packing = best_fit_decreasing(lengths, form.seq_length)
        values = np.memmap(self._file.path, dtype=np.int32, mode="r") if len(codes) else np.zeros(0, np.int32)
        starts = np.cumsum(lengths * (2 + weighted)) - lengths * (2 + weighted)
        for rows in packing:
            yield form.row(
                [_part(values[starts[row] :], int(lengths[row]), bool(weighted[row])) for row in rows]
            )

    def close(self) -> None:
        """Remove the file."""
        self._file.discard()


def _part(values: Array, length: int, weighted: bool) -> Part:
    weights = values[2 * length : 3 * length].view(np.float32) if weighted else None
    return values[:length], values[length : 2 * length], weights
