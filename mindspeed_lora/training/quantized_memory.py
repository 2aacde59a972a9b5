"""Bytes of quantised weights on one rank, told from sizes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from mindspeed_lora.checkpoint.canonical import TensorRule, shard_ranges, tensor_rule
from mindspeed_lora.checkpoint.loading.local_parameters import is_of_experts
from mindspeed_lora.checkpoint.loading.quantized import shard_pieces
from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.models.families import FAMILIES
from mindspeed_lora.models.families.segments import Segment
from mindspeed_lora.quantization.product import TILE_BYTES
from mindspeed_lora.quantization.runs import Run
from mindspeed_lora.training.layer_memory import MemoryQuestion


@dataclass(frozen=True)
class QuantizedMemory:
    """Of one rank."""

    weights: int
    """How many numbers are held quantised."""
    bytes: int
    """With their statistics."""
    tile: int
    """Bytes of the buffer that they are dequantised into."""

    def __add__(self, other: QuantizedMemory) -> QuantizedMemory:
        """Of both together; they use one buffer."""
        return QuantizedMemory(
            self.weights + other.weights, self.bytes + other.bytes, max(self.tile, other.tile)
        )

    @property
    def bits(self) -> float:
        """Of each number."""
        return 8 * self.bytes / self.weights if self.weights else 0.0


def quantized_memory(question: MemoryQuestion, own: Mapping[str, tuple[int, ...]]) -> QuantizedMemory:
    """The quantised ones among these canonical tensors; of experts on average over the EP ranks."""
    plan = question.quantization
    weights = size_of_all = largest = 0
    for name, (rows, columns) in _matrices(question, own).items():
        assert plan is not None
        of_experts = is_of_experts(name)
        tp, share = (question.etp, question.ep) if of_experts else (question.tp, 1)
        rule = tensor_rule(name)
        segments = _segments(name, question.shape, rows)
        count = rows * columns // (1 if rule.axis is None else tp)
        weights += count // share
        size_of_all += _bytes(plan.settings, segments, rule, (rows, columns), tp) // share
        largest = max(largest, count)
    return QuantizedMemory(weights, size_of_all, min(TILE_BYTES, largest * question.itemsize))


def _matrices(question: MemoryQuestion, own: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    plan = question.quantization
    return {
        name: (size[0], size[1]) for name, size in own.items() if plan is not None and name in plan.weights
    }


def _segments(name: str, shape: ModelShape, rows: int) -> tuple[Segment, ...]:
    return tuple(FAMILIES[shape.family].mapping(name)[0].segments(shape, rows))


@cache
def _bytes(
    settings: QuantSettings,
    segments: tuple[Segment, ...],
    rule: TensorRule,
    whole: tuple[int, int],
    tp: int,
) -> int:
    """Of the first rank's shard of one canonical matrix, as :mod:`mindspeed_lora.quantization.cutting` keeps it."""
    ranges = [] if rule.axis is None else shard_ranges(rule, whole[rule.axis], 0, tp)
    pieces = list(shard_pieces(segments, rule.axis, ranges, whole))
    count = sum(piece.size for piece in pieces)
    if settings.kind == "int8":
        return count + sum(4 * (piece.rows[1] - piece.rows[0]) for piece in pieces)
    runs = [Run.of(piece, whole[1], settings.block_size, 0, 0) for piece in pieces]
    statistics = sum(run.num_statistics for run in runs)
    if not settings.double:
        return math.ceil(count / 2) + 4 * statistics
    return math.ceil(count / 2) + statistics + 8 * sum(run.num_nested for run in runs)
