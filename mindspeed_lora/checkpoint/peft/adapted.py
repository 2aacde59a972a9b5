"""A base with what an adapter or added tokens change of it, but for an adapter's factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mindspeed_lora.checkpoint.canonical import EMBEDDING, VOCABULARY_TENSORS
from mindspeed_lora.checkpoint.peft.source import AdapterSource
from mindspeed_lora.checkpoint.source import CheckpointSource, Source
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.models.families.segments import Range
from mindspeed_lora.quantization.matrix import QuantizedMatrix


class AdaptedSource(CheckpointSource):
    """What the adapter's file holds is read from it.

    A tied output layer that comes apart starts as the embedding; rows of new words start as the mean of the base's.

    Args:
        base: the weights that the adapter is for.
        shape: of the model with the adapter on it.
        adapter: None where all that it trains starts at the base.
        dtype: that tensors which the adapter changes in part are read in; None is the base's.
    """

    def __init__(
        self,
        base: Source,
        shape: ModelShape,
        adapter: AdapterSource | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(base.path, shape, base.origin, base.config_dir)
        self.base = base
        self.adapter = adapter
        self.quantization = base.quantization
        self._part_dtype = dtype
        self._in_base = set(base.names())
        self._means: dict[str, torch.Tensor] = {}

    def dtype(self, name: str) -> torch.dtype:
        """The adapter's dtype of a tensor that it holds whole, else the base's."""
        if self.adapter is not None and self.adapter.holds_whole(name):
            return self.adapter.dtype(name)
        if self._part_dtype is not None and self._is_changed_in_part(name):
            return self._part_dtype
        return self.base.dtype(self._base_name(name))

    def read(self, name: str, axis: int | None = None, ranges: Sequence[Range] | None = None) -> torch.Tensor:
        """The tensor, or ranges of it; what the adapter leaves as it is comes from the base without a copy."""
        if name in VOCABULARY_TENSORS or self._is_held(name):
            return super().read(name, axis, ranges)
        return self.base.read(name, axis, ranges)

    def is_quantized(self, name: str) -> bool:
        """Whether the base stores a tensor quantised and the adapter does not hold it."""
        return not self._is_held(name) and self.base.is_quantized(name)

    def quantized(self, name: str) -> list[QuantizedMatrix] | None:
        """The base's matrices, of what the adapter does not hold."""
        return None if self._is_held(name) else self.base.quantized(name)

    def _is_held(self, name: str) -> bool:
        adapter = self.adapter
        return adapter is not None and (adapter.holds_whole(name) or adapter.holds_part(name))

    def _is_changed_in_part(self, name: str) -> bool:
        adapter = self.adapter
        return adapter is not None and (
            adapter.holds_part(name) or any(rows.tensor == name for rows in adapter.spec.token_rows)
        )

    def _fill(self, out: torch.Tensor, name: str, wanted: Sequence[Sequence[Range]]) -> None:
        adapter = self.adapter
        if adapter is not None and adapter.holds_whole(name):
            adapter.fill(out, name, wanted)
        elif adapter is not None and adapter.holds_part(name):
            whole = adapter.overlay(self.base.read(name).to(out.dtype), name)
            for axis, ranges in enumerate(wanted):
                whole = torch.cat(
                    [whole.narrow(axis, start, stop - start) for start, stop in ranges], dim=axis
                )
            out.copy_(whole)
        elif name in VOCABULARY_TENSORS:
            self._fill_words(out, self._base_name(name), wanted)
        if adapter is not None and name in VOCABULARY_TENSORS:
            self._put_rows(out, name, wanted[0], adapter)

    def _fill_words(self, out: torch.Tensor, name: str, wanted: Sequence[Sequence[Range]]) -> None:
        """Rows of a vocabulary tensor; those that the base does not have are the mean of those that it has."""
        count, at = self.base.shape.vocab_size, 0
        for start, stop in wanted[0]:
            last = max(start, min(stop, count))
            if start < last:
                out[at : at + last - start] = self.base.read(name, 0, [(start, last)])
            if last < stop:
                out[at + last - start : at + stop - start] = self._mean(name)
            at += stop - start

    def _mean(self, name: str) -> torch.Tensor:
        """The mean row ``[h]`` of one of the base's vocabulary tensors, float32, read piece by piece."""
        if name not in self._means:
            count, total = (
                self.base.shape.vocab_size,
                torch.zeros(self.shape.hidden_size, dtype=torch.float64),
            )
            for start in range(0, count, _ROWS_AT_ONCE):
                rows = self.base.read(name, 0, [(start, min(start + _ROWS_AT_ONCE, count))])
                total += rows.sum(dim=0, dtype=torch.float64)
            self._means[name] = (total / count).float()
        return self._means[name]

    def _put_rows(
        self, out: torch.Tensor, name: str, ranges: Sequence[Range], adapter: AdapterSource
    ) -> None:
        """Puts the rows of single tokens into their places among these ranges."""
        for rows in adapter.spec.token_rows:
            if rows.tensor != name:
                continue
            values, at = adapter.read(rows.name).to(out.dtype), 0
            for start, stop in ranges:
                for row, token in enumerate(rows.tokens):
                    if start <= token < stop:
                        out[at + token - start] = values[row]
                at += stop - start

    def _base_name(self, name: str) -> str:
        return name if name in self._in_base else EMBEDDING


_ROWS_AT_ONCE = 4096
