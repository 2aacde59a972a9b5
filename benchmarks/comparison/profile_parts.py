"""Assigns the time of a profiled training step to parts, and counts the products that were really done.

An event of the profiler is a torch operation, an autograd node or a named range; its self time is what its
children do not explain. What no event explains is Python and waiting, and goes to the rest.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

FROZEN = "products with frozen weights"
ADAPTERS = "products of the adapters"
ATTENTION = "attention"
LOSS = "output layer and loss"
ELEMENT_WISE = "element-wise, norms, copies"
OPTIMIZER = "optimizer"
REST = "rest (Python, autograd, schedule)"
PARTS = (FROZEN, ADAPTERS, ATTENTION, LOSS, ELEMENT_WISE, OPTIMIZER, REST)

OPTIMIZER_RANGE = "benchmark: optimizer"
"""Name of the range around the optimizer's work."""

_LEFT_OPERAND = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1}
_ATTENTION_FORWARD = "aten::_scaled_dot_product_flash_attention_for_cpu"
# Scores and context in forward; in backward the scores anew, and the gradients of all four operands.
_ATTENTION_PRODUCTS = {_ATTENTION_FORWARD: (2, 0), f"{_ATTENTION_FORWARD}_backward": (5, 1)}


class Event(Protocol):
    """What is used of ``torch.autograd.profiler_util.FunctionEvent``."""

    name: str
    cpu_parent: Event | None
    input_shapes: Sequence[Sequence[int]]

    @property
    def self_cpu_time_total(self) -> float:
        """Microseconds."""
        ...


@dataclass
class Part:
    """Time and work of one part."""

    ms: float = 0.0
    gflop: float = 0.0


def parts_of(events: Iterable[Event], wall_ms: float, rank: int) -> dict[str, Part]:
    """The parts of what ran ``wall_ms`` milliseconds under the profiler; ``rank`` is that of the adapters."""
    parts: dict[str, Part] = defaultdict(Part)
    for event in events:
        part = parts[_part_of(event, rank)]
        part.ms += event.self_cpu_time_total / 1000
        part.gflop += operations(event) / 1e9
    parts[REST].ms += wall_ms - sum(part.ms for part in parts.values())
    return {name: parts[name] for name in PARTS}


def operations(event: Event) -> float:
    """Floating point operations of a product, or of the products inside a causal attention; else 0."""
    if event.name in _LEFT_OPERAND:
        *batch, rows, inner, columns = product_shape(event)
        return 2.0 * math.prod(batch) * rows * inner * columns
    if event.name in _ATTENTION_PRODUCTS:
        count, query = _ATTENTION_PRODUCTS[event.name]
        b, n, s, d = event.input_shapes[query]
        # A causal row sees itself and what is before it.
        return count * 2.0 * b * n * d * s * (s + 1) / 2
    return 0.0


def product_shape(event: Event) -> tuple[int, ...]:
    """``(rows, inner, columns)`` of a matrix product, with the batch before them where there is one."""
    left = _LEFT_OPERAND[event.name]
    first, second = event.input_shapes[left], event.input_shapes[left + 1]
    return (*first, second[-1])


def plain_products(events: Iterable[Event]) -> Counter[tuple[int, ...]]:
    """How often each shape of an unbatched product occurs."""
    return Counter(
        product_shape(event) for event in events if event.name in ("aten::mm", "aten::addmm", "aten::addmm_")
    )


def slowest(events: Iterable[Event], count: int) -> list[tuple[str, int, float]]:
    """The operations with most self time: name, calls, milliseconds."""
    calls: Counter[str] = Counter()
    times: dict[str, float] = defaultdict(float)
    for event in events:
        calls[event.name] += 1
        times[event.name] += event.self_cpu_time_total / 1000
    names = sorted(times, key=lambda name: times[name], reverse=True)[:count]
    return [(name, calls[name], times[name]) for name in names]


def _part_of(event: Event, rank: int) -> str:
    names = [ancestor.name for ancestor in _line(event)]
    if OPTIMIZER_RANGE in names:
        return OPTIMIZER
    if any("CrossEntropy" in name for name in names):
        return LOSS
    if any("attention" in name.lower() or "ScaledDotProduct" in name for name in names):
        return ATTENTION
    if event.name in _LEFT_OPERAND:
        return ADAPTERS if rank in product_shape(event) else FROZEN
    return ELEMENT_WISE if event.name.startswith("aten::") else REST


def _line(event: Event) -> Iterator[Event]:
    """The event and its ancestors."""
    current: Event | None = event
    while current is not None:
        yield current
        current = current.cpu_parent
