"""Sources made of another source: an adapter merged into it, or its tensors cast to one dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from mindspeed_lora.checkpoint.adapted import AdaptedSource
from mindspeed_lora.checkpoint.adapter import AdapterSource
from mindspeed_lora.checkpoint.canonical import EMBEDDING
from mindspeed_lora.checkpoint.source import CheckpointSource, Source
from mindspeed_lora.checkpoint.trained_tensors import model_shape
from mindspeed_lora.models.families import FAMILIES
from mindspeed_lora.models.families.segments import Range


def merge_weight(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """``W + (B·A)·s`` in fp32, in this order, rounded once to W's dtype.

    ``weight`` is ``[out, in]``, ``lora_a`` ``[r, in]``, ``lora_b`` ``[out, r]``, all of one Hugging Face
    matrix.
    """
    delta = (lora_b.float() @ lora_a.float()).mul_(scaling)
    return (weight.float() + delta).to(weight.dtype)


class DerivedSource(CheckpointSource):
    """A source computed tensor by tensor from another one; a request for ranges computes the whole tensor."""

    def __init__(self, base: Source) -> None:
        super().__init__(base.path, base.shape, base.origin, base.config_dir)
        self.base = base

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the base's tensor."""
        return self.base.dtype(name)

    def _derive(self, name: str) -> torch.Tensor:
        raise NotImplementedError

    def read(self, name: str, axis: int | None = None, ranges: Sequence[Range] | None = None) -> torch.Tensor:
        """The derived tensor, or the concatenation of its ``ranges`` along ``axis``."""
        if axis is None or ranges is None or list(ranges) == [(0, self.tensors[name][axis])]:
            return self._derive(name)
        return super().read(name, axis, ranges)

    def _fill(self, out: torch.Tensor, name: str, wanted: Sequence[Sequence[Range]]) -> None:
        value = self._derive(name)
        for axis, ranges in enumerate(wanted):
            value = torch.cat([value.narrow(axis, start, stop - start) for start, stop in ranges], dim=axis)
        out.copy_(value)


class MergedSource(DerivedSource):
    """A model with an adapter merged in, per Hugging Face matrix, so that every layout gets the same bits."""

    def __init__(self, base: Source, adapter: AdapterSource) -> None:
        super().__init__(AdaptedSource(base, model_shape(adapter.config, adapter.shape), adapter))
        self.adapter = adapter
        self.family = FAMILIES[base.shape.family]
        self._dtypes = {name: base.dtype(name) for name in base.names()}

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the tensor without the adapter."""
        return self._dtypes.get(name, self._dtypes[EMBEDDING])

    def _derive(self, name: str) -> torch.Tensor:
        whole = self.base.read(name).to(self.dtype(name))
        mapping, layer = self.family.mapping(name)
        targeted = [module in self.adapter.hf_modules for module in mapping.modules(layer)]
        if not name.endswith(".weight") or not any(targeted):
            return whole
        parts = [
            merge_weight(part, *self.adapter.factors(module)) if hit else part
            for part, module, hit in zip(
                mapping.split(self.shape, whole), mapping.modules(layer), targeted, strict=True
            )
        ]
        return mapping.join(self.shape, parts)


class CastSource(DerivedSource):
    """A model with all tensors rounded to one dtype."""

    def __init__(self, base: Source, dtype: torch.dtype) -> None:
        super().__init__(base)
        self.shape = dataclasses.replace(base.shape, params_dtype=str(dtype).removeprefix("torch."))
        self._dtype = dtype

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that is cast to."""
        return self._dtype

    def _derive(self, name: str) -> torch.Tensor:
        return self.base.read(name).to(self._dtype)
