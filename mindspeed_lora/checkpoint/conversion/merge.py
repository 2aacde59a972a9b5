"""Sources made of another source: adapters merged into it or taken out of it, or its tensors cast to one dtype.

A merge is ``W + Σ w_i·s_i·(B_i·A_i)`` per Hugging Face matrix: each ``(B·A)·(s·w)`` and their sum, in the order of the
adapters, in float32, then W added and rounded once to the dtype that is written. It works block by block in place, and
on a range of rows or columns as on the whole, with the same bits.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mindspeed_lora.checkpoint.canonical import EMBEDDING
from mindspeed_lora.checkpoint.conversion.low_rank import Block, LowRankProduct, blocks
from mindspeed_lora.checkpoint.conversion.rounding import Losses, LossReport, losses
from mindspeed_lora.checkpoint.latest import Latest
from mindspeed_lora.checkpoint.peft.adapted import AdaptedSource
from mindspeed_lora.checkpoint.peft.source import AdapterSource
from mindspeed_lora.checkpoint.peft.trained_tensors import model_shape
from mindspeed_lora.checkpoint.source import CheckpointSource, Source
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.models.families import FAMILIES
from mindspeed_lora.models.families.segments import Range
from mindspeed_lora.quantization.matrix import QuantizedMatrix

Wanted = tuple[tuple[Range, ...], ...]
"""Per axis of a tensor, the ranges that are concatenated along it."""


class DerivedSource(CheckpointSource):
    """A source computed from another one, slice by slice; ``dtype`` is what all is rounded to, None keeps each's."""

    def __init__(self, base: Source, shape: ModelShape, dtype: torch.dtype | None) -> None:
        if dtype is not None:
            shape = dataclasses.replace(shape, params_dtype=str(dtype).removeprefix("torch."))
        super().__init__(base.path, shape, base.origin, base.config_dir)
        self.base = base
        self.losses = LossReport()
        """What rounding to float16 lost."""
        self._dtype = dtype

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that is rounded to, else the base's."""
        return self._dtype or self.base.dtype(name)

    def read(self, name: str, axis: int | None = None, ranges: Sequence[Range] | None = None) -> torch.Tensor:
        """The derived tensor, or the concatenation of its ``ranges`` along ``axis``, computed for these alone."""
        wanted: list[tuple[Range, ...]] = [((0, size),) for size in self.tensors[name]]
        if axis is not None and ranges is not None:
            wanted[axis] = tuple(ranges)
        value, lost = self._derive(name, self.base.read(name, axis, ranges), tuple(wanted))
        self.losses.note(name, tuple(wanted), lost)
        return value

    def _derive(self, name: str, value: torch.Tensor, wanted: Wanted) -> tuple[torch.Tensor, Losses]:
        """The derived values of a slice of the base, which may be changed in place."""
        rounded = value.to(self.dtype(name))
        return rounded, losses(value, rounded)


class CastSource(DerivedSource):
    """A model with all tensors rounded to one dtype."""

    def __init__(self, base: Source, dtype: torch.dtype) -> None:
        super().__init__(base, base.shape, dtype)
        self.quantization = base.quantization

    def is_quantized(self, name: str) -> bool:
        """Whether the base holds it quantised."""
        return self.base.is_quantized(name)

    def quantized(self, name: str) -> list[QuantizedMatrix] | None:
        """The base's codes, which stand for values of the other dtype."""
        matrices, dtype = self.base.quantized(name), self.dtype(name)
        if matrices is None or matrices[0].settings.kind == "int8":
            return matrices
        return [dataclasses.replace(matrix, dtype=dtype) for matrix in matrices]


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter of a merge."""

    source: AdapterSource
    weight: float = 1.0
    """Factor on its scaling."""


class MergedSource(DerivedSource):
    """A model with adapters merged in, or with ``unmerge`` taken out, per Hugging Face matrix.

    What an adapter holds whole (modules to save, biases, rows of tokens) takes the base's place, whatever its weight.
    """

    def __init__(
        self,
        base: Source,
        adapters: Sequence[WeightedAdapter],
        dtype: torch.dtype | None = None,
        unmerge: bool = False,
    ) -> None:
        adapted = base
        for one in adapters:
            adapted = AdaptedSource(adapted, _with_adapter(adapted.shape, one.source), one.source, dtype)
        super().__init__(adapted, adapted.shape, dtype)
        self.adapters = tuple(adapters)
        self.family = FAMILIES[base.shape.family]
        self.residual = Residual() if unmerge else None
        """After taking out: what merging again would not restore."""
        self._stored = {name: base.dtype(name) for name in base.names()}
        self._latest: Latest[Mapping[int, list[LowRankProduct]]] = Latest()

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that is rounded to, else that of the tensor without the adapters."""
        return self._dtype or self._stored.get(name, self._stored[EMBEDDING])

    def _derive(self, name: str, value: torch.Tensor, wanted: Wanted) -> tuple[torch.Tensor, Losses]:
        # Read once for all slices of a tensor.
        products = self._latest.get(name, lambda: self._products(name))
        if not products:
            return super()._derive(name, value, wanted)
        mapping, _ = self.family.mapping(name)
        dtype = self.dtype(name)
        merged = value if value.dtype == dtype else torch.empty_like(value, dtype=dtype)
        lost = Losses()
        for block in blocks(mapping.segments(self.shape, self.tensors[name][0]), wanted):
            lost += self._merge_block(name, block, products.get(block.part, ()), value, merged)
        return merged, lost

    def _merge_block(
        self,
        name: str,
        block: Block,
        products: Sequence[LowRankProduct],
        value: torch.Tensor,
        merged: torch.Tensor,
    ) -> Losses:
        """Fill one block of ``merged`` from ``value``, which may be the same tensor; both as they were read."""
        delta = _total(products, block)
        lost = Losses()
        for run in block.runs:
            old, new = block.window(run, value), block.window(run, merged)
            if delta is None:
                if merged is not value:
                    new.copy_(old)
                    lost += losses(old, new)
                continue
            own = delta[run.start - block.rows[0] : run.stop - block.rows[0]]
            if self.residual is None:
                exact = own.add_(old)
            else:
                exact = own + old
                self.residual.note(name, old, (exact.to(new.dtype) - own).to(old.dtype))
            new.copy_(exact)
            lost += losses(exact, new)
        return lost

    def _products(self, name: str) -> Mapping[int, list[LowRankProduct]]:
        """The adapters' products on each of the matrices, by number, that a canonical tensor is made of."""
        if not name.endswith(".weight"):
            return {}
        mapping, layer = self.family.mapping(name)
        sign = -1.0 if self.residual is not None else 1.0
        found: dict[int, list[LowRankProduct]] = {}
        for part, module in enumerate(mapping.modules(layer)):
            for one in self.adapters:
                if module in one.source.hf_modules:
                    lora_a, lora_b, scaling = one.source.factors(module)
                    product = LowRankProduct(lora_a, lora_b, scaling * one.weight * sign)
                    found.setdefault(part, []).append(product)
        return found


class Residual:
    """How far ``merge(unmerge(W))`` is from W; several threads may add to it."""

    def __init__(self) -> None:
        self.difference = 0.0
        """The largest difference of a value."""
        self.largest = 0.0
        """The largest value of a tensor that was changed."""
        self.name = ""
        """The tensor with the largest difference."""
        self._lock = threading.Lock()

    def note(self, name: str, before: torch.Tensor, again: torch.Tensor) -> None:
        """Note a part of W, and what taking out and merging again makes of it."""
        difference = float((again.float() - before.float()).abs().max())
        largest = float(before.abs().max())
        with self._lock:
            self.largest = max(self.largest, largest)
            if difference > self.difference or not self.name:
                self.difference, self.name = difference, name

    def sentence(self) -> str:
        """What was lost, in one line."""
        share = self.difference / self.largest if self.largest else 0.0
        where = f", in {self.name}" if self.difference else ""
        return (
            f"unmerged up to rounding: merging again would leave a difference of at most {self.difference:.3g} "
            f"({share:.2g} of the largest changed value{where})"
        )


def _total(products: Sequence[LowRankProduct], block: Block) -> torch.Tensor | None:
    """The sum of the products on a block, in their order."""
    total: torch.Tensor | None = None
    for product in products:
        own = product.region(block.rows, block.columns)
        total = own if total is None else total.add_(own)
    return total


def _with_adapter(shape: ModelShape, adapter: AdapterSource) -> ModelShape:
    """The shape of a model that may carry other adapters already, with this one on it too."""
    own = model_shape(adapter.config, adapter.shape)
    return dataclasses.replace(
        shape,
        vocab_size=max(shape.vocab_size, own.vocab_size),
        untie_embeddings_and_output_weights=shape.untie_embeddings_and_output_weights
        or own.untie_embeddings_and_output_weights,
    )
