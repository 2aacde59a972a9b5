"""A rank's part of a frozen weight, quantised: what takes the place of ``weight`` in a linear.

Its numbers are, bit for bit, those of the whole matrices, however they are cut.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.quantization.codebooks import dynamic_values
from mindspeed_lora.quantization.cutting import Cut, cut
from mindspeed_lora.quantization.decoding import decode_blocks, decode_counts, decode_rows
from mindspeed_lora.quantization.matrix import QuantizedMatrix
from mindspeed_lora.quantization.runs import NESTED_BLOCK, Piece, Run

Tensor = torch.Tensor


class QuantizedWeight(torch.nn.Module):
    """``[out, in]``, or of experts ``[e, out, in]``, without a parameter: codes and statistics are buffers.

    They are not in the state dict, and a change of dtype leaves them as they are.
    """

    requires_grad = False

    codes: Tensor
    statistics: Tensor
    nested: Tensor | None

    def __init__(self, kept: Cut, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.settings: QuantSettings = kept.settings
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self._rounding = kept.rounding
        self._runs = kept.runs
        self._first = 0
        self._is_regular = all(run.is_regular for run in kept.runs)
        for name in ("codes", "statistics", "nested"):
            self.register_buffer(name, getattr(kept, name), persistent=False)

    @classmethod
    def from_matrices(
        cls,
        matrices: Iterable[QuantizedMatrix],
        pieces: Sequence[Piece],
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> QuantizedWeight:
        """The shard that ``pieces`` make one below the other (experts: expert by expert).

        Args:
            matrices: whole ones, in the order of their indices; each may be freed when the next one is asked for.
            shape: ``[out, in]`` or ``[e, out, in]`` of the shard; all pieces are ``in`` columns wide.
            dtype: of what :meth:`dense` gives.
        """
        assert all(piece.columns[1] - piece.columns[0] == shape[-1] for piece in pieces)
        assert sum(piece.size for piece in pieces) == torch.Size(shape).numel(), (
            "the pieces do not fill the shard"
        )
        return cls(cut(matrices, pieces), shape, dtype)

    @property
    def device(self) -> torch.device:
        """Where codes and statistics are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and statistics."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def dim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def size(self, dim: int) -> int:
        """Of one axis."""
        return self.shape[dim]

    def numel(self) -> int:
        """How many weights."""
        return self.shape.numel()

    def element_size(self) -> int:
        """Bytes of a dequantised weight."""
        return self.dtype.itemsize

    def extra_repr(self) -> str:
        """Shape and form, for the printed module tree."""
        return f"{list(self.shape)}, {self.settings}"

    def expert(self, index: int) -> QuantizedWeight:
        """``[out, in]`` of one expert of a stack; shares the buffers."""
        found = copy.copy(self)
        found.shape = self.shape[1:]
        found._first = self._first + index * found.shape.numel()
        return found

    def dense(self, rows: slice | None = None, out: Tensor | None = None) -> Tensor:
        """Dequantised ``rows`` of the matrix, of a stack those of each expert, in ``dtype``.

        Args:
            rows: without a step; default all.
            out: where to put them, contiguous; default a new tensor.
        """
        first, last, _ = (rows or slice(None)).indices(self.size(-2))
        if out is None:
            out = torch.empty(
                *self.shape[:-2], last - first, self.size(-1), dtype=self.dtype, device=self.device
            )
        if self.dim() == 2 or (first, last) == (0, self.size(-2)):
            self._decode(self._first + first * self.size(-1), out.view(-1))
        else:
            for index in range(self.size(0)):
                self.expert(index).dense(rows, out[index])
        return out

    def _decode(self, first: int, out: Tensor) -> None:
        """Numbers ``[first, first + n)`` of the whole shard into ``out [n]``."""
        last = first + out.numel()
        if first == last:
            return
        if self.settings.kind == "int8":
            width = self.size(-1)
            rows = slice(first // width, last // width)
            codes = self.codes[first:last].view(-1, width)
            decode_rows(codes, self.statistics[rows], self._rounding, out.view(-1, width))
            return
        block, kind, rounding = self.settings.block_size, self.settings.kind, self._rounding
        if first % block == 0 and last % block == 0 and self._is_regular:
            scales = self._scales(first // block, last // block)
            decode_blocks(self.codes[first // 2 : last // 2], scales, block, kind, rounding, out)
            return
        runs = [run for run in self._runs if run.place < last and run.end > first]
        scales = self._scales(runs[0].first_statistic, runs[-1].first_statistic + runs[-1].num_statistics)
        counts = torch.cat([run.counts(first, last, self.device) for run in runs])
        codes = self.codes[first // 2 : (last + 1) // 2]
        if first % 2 == 0:
            decode_counts(codes, scales, counts, kind, rounding, out)
        else:  # one number before the first
            counts = torch.cat([counts.new_ones(1), counts])
            more = out.new_empty(out.numel() + 1)
            decode_counts(codes, torch.cat([scales[:1], scales]), counts, kind, rounding, more)
            out.copy_(more[1:])

    def _scales(self, first: int, last: int) -> Tensor:
        """Magnitudes of statistics ``[first, last)``, float32."""
        codes = self.statistics[first:last]
        if self.nested is None:
            return codes
        values = dynamic_values(self.device).index_select(0, codes.int())
        index = self._nested_indices(first, last)
        magnitudes, offsets = self.nested
        return values.mul_(magnitudes.index_select(0, index)).add_(offsets.index_select(0, index))

    def _nested_indices(self, first: int, last: int) -> Tensor:
        assert self.nested is not None
        parts = []
        for run in self._runs:
            begin = max(first - run.first_statistic, 0)
            end = min(last - run.first_statistic, run.num_statistics)
            if begin < end:
                parts.append(_nested_indices(run, begin, end, self.device))
        index = parts[0] if len(parts) == 1 else torch.cat(parts)
        return index.clamp_(max=self.nested.size(1) - 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the buffers with ``fn`` but never changes their dtype: statistics are exact in float32 alone."""

        def moved(buffer: Tensor) -> Tensor:
            found = fn(buffer)
            return found if found.dtype == buffer.dtype else buffer.to(found.device)

        return super()._apply(moved, recurse)


def _nested_indices(run: Run, first: int, last: int, device: torch.device) -> Tensor:
    """Where the nested statistics of statistics ``[first, last)`` of a run are among the shard's."""
    blocks = run.block_indices(first, last, device)
    return blocks.div_(NESTED_BLOCK, rounding_mode="floor").add_(run.first_nested - run.first_nested_block)
