"""A source whose linears are quantised on their way, whatever they were: what a quantised target is made from."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence

import torch

from mindspeed_lora.checkpoint.latest import Latest
from mindspeed_lora.checkpoint.quantized.values import dequantize_rows, fill_values
from mindspeed_lora.checkpoint.source import CheckpointSource, Source, StoredPart
from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.models.families import FAMILIES
from mindspeed_lora.models.families.segments import Range
from mindspeed_lora.quantization.matrix import QuantizedMatrix, quantize


class QuantizingSource(CheckpointSource):
    """The base with these weights quantised and all others plain.

    A weight that the base holds quantised keeps its codes; of the others each Hugging Face matrix is quantised from
    the base's values. Reading a quantised weight gives the values that the codes stand for.

    Args:
        base: plain, or quantised by the same settings.
        settings: None where all is plain.
        weights: canonical names.
        measure: note how far the values are from the base's.
    """

    def __init__(
        self, base: Source, settings: QuantSettings | None, weights: Collection[str], measure: bool = False
    ) -> None:
        super().__init__(base.path, base.shape, base.origin, base.config_dir)
        self.base = base
        self.quantization = settings
        self.weights = frozenset(weights)
        self.error = QuantError() if measure else None
        """How far the quantised values are from the base's."""
        self._family = FAMILIES[base.shape.family]
        self._latest: Latest[list[QuantizedMatrix]] = Latest()

    def dtype(self, name: str) -> torch.dtype:
        """The base's dtype, which values are decoded to."""
        return self.base.dtype(name)

    def parts(self, name: str) -> list[StoredPart]:
        """The base's tensors."""
        return self.base.parts(name)

    def is_quantized(self, name: str) -> bool:
        """Whether the weight is to be quantised."""
        return name in self.weights

    def quantized(self, name: str) -> list[QuantizedMatrix] | None:
        """The weight's matrices, quantised.

        Raises:
            Refused: one holds NaN or infinite values.
        """
        if name not in self.weights:
            return None
        return self.base.quantized(name) or list(self._quantize(name))

    def read(self, name: str, axis: int | None = None, ranges: Sequence[Range] | None = None) -> torch.Tensor:
        """The base's tensor, of a quantised one what its codes stand for."""
        if name not in self.weights or self.base.is_quantized(name):
            return self.base.read(name, axis, ranges)
        return super().read(name, axis, ranges)

    def _fill(self, out: torch.Tensor, name: str, wanted: Sequence[Sequence[Range]]) -> None:
        mapping, _ = self._family.mapping(name)
        matrices = self._latest.get(name, lambda: self.quantized(name) or [])
        fill_values(out, matrices, mapping.segments(self.shape, self.tensors[name][0]), wanted)

    def _quantize(self, name: str) -> Iterator[QuantizedMatrix]:
        assert self.quantization is not None
        mapping, layer = self._family.mapping(name)
        for hf_name, rows in zip(
            mapping.names(layer), mapping.places(self.shape, self.tensors[name][0]), strict=True
        ):
            values = self.base.read(name, 0, rows)
            matrix = quantize(values, self.quantization, f"{self.path}: {hf_name}")
            if self.error is not None:
                self.error.note(hf_name, values, matrix)
            yield matrix


class MeasuredSource(QuantizingSource):
    """The plain base as it is; how far quantised weights would be from it is noted of what is read."""

    def __init__(self, base: Source, settings: QuantSettings, weights: Collection[str]) -> None:
        super().__init__(base, settings, weights, measure=True)

    def is_quantized(self, name: str) -> bool:
        """False: nothing is quantised here."""
        return False

    def read(self, name: str, axis: int | None = None, ranges: Sequence[Range] | None = None) -> torch.Tensor:
        """The base's tensor."""
        if name in self.weights:
            self._latest.get(name, lambda: self.quantized(name) or [])
        return self.base.read(name, axis, ranges)


class QuantError:
    """How far quantised values are from what was quantised; several threads may add to it."""

    _ROWS_AT_ONCE = 256

    def __init__(self) -> None:
        self.largest = 0.0
        """The largest difference of a value."""
        self.name = ""
        """The matrix that has it."""
        self._squares = {"difference": 0.0, "values": 0.0}
        self._lock = threading.Lock()

    @property
    def relative(self) -> float:
        """The norm of the differences as a share of that of the values."""
        values = self._squares["values"]
        return float((self._squares["difference"] / values) ** 0.5) if values else 0.0

    def note(self, name: str, values: torch.Tensor, matrix: QuantizedMatrix) -> None:
        """Note a matrix ``[out, in]`` and what it was quantised to."""
        largest, squares, of_values = 0.0, 0.0, 0.0
        for start in range(0, values.size(0), self._ROWS_AT_ONCE):
            some = values[start : start + self._ROWS_AT_ONCE].float()
            gap = dequantize_rows(matrix, (start, start + some.size(0))).float().sub_(some)
            largest = max(largest, float(gap.abs().max()))
            squares += float(gap.square().sum(dtype=torch.float64))
            of_values += float(some.square().sum(dtype=torch.float64))
        with self._lock:
            self._squares["difference"] += squares
            self._squares["values"] += of_values
            if largest > self.largest:
                self.largest, self.name = largest, name

    def sentence(self, what: str, of: str) -> str:
        """The difference in words: ``what`` differs from ``of``."""
        where = f", in {self.name}" if self.name else ""
        return (
            f"{what} differ from {of} by at most {self.largest:.3g}{where}; relative norm {self.relative:.3g}"
        )
