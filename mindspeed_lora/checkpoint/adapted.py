"""A base with what an adapter changes of it, but for its factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mindspeed_lora.checkpoint.adapter import AdapterSource
from mindspeed_lora.checkpoint.canonical import EMBEDDING
from mindspeed_lora.checkpoint.source import CheckpointSource, Source
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.models.families.segments import Range


class AdaptedSource(CheckpointSource):
    """Tensors that the adapter trains are read from it; a tied output layer that comes apart starts as the embedding.

    Args:
        base: the weights that the adapter is for.
        shape: of the model with the adapter on it.
        adapter: where trained tensors are read from; None where they start at the base.
    """

    def __init__(self, base: Source, shape: ModelShape, adapter: AdapterSource | None) -> None:
        super().__init__(base.path, shape, base.origin, base.config_dir)
        self.base = base
        self.adapter = adapter
        self._in_base = set(base.names())

    def dtype(self, name: str) -> torch.dtype:
        """The adapter's dtype of a tensor that it trains whole, else the base's."""
        if self.adapter is not None and name in self.adapter.trained and self.adapter.trained[name].is_whole:
            return self.adapter.dtype(name)
        return self.base.dtype(self._base_name(name))

    def _fill(self, out: torch.Tensor, name: str, wanted: Sequence[Sequence[Range]]) -> None:
        adapter = self.adapter
        if adapter is None or name not in adapter.trained:
            out.copy_(_read(self.base, self._base_name(name), self.tensors[name], wanted))
        elif adapter.trained[name].is_whole:
            adapter.fill(out, name, wanted)
        else:
            whole = adapter.overlay(self.base.read(name), name)
            for axis, ranges in enumerate(wanted):
                whole = torch.cat(
                    [whole.narrow(axis, start, stop - start) for start, stop in ranges], dim=axis
                )
            out.copy_(whole)

    def _base_name(self, name: str) -> str:
        return name if name in self._in_base else EMBEDDING


def _read(
    source: Source, name: str, size: tuple[int, ...], wanted: Sequence[Sequence[Range]]
) -> torch.Tensor:
    """Ranges of a tensor, cut along one axis at most."""
    for axis, ranges in enumerate(wanted):
        if list(ranges) != [(0, size[axis])]:
            return source.read(name, axis, ranges)
    return source.read(name)
