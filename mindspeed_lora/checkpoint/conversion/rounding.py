"""What rounding to float16 does to values: those beyond its range, and those too small for it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch

_CHUNK_VALUES = 1 << 20
_SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal


@dataclass(frozen=True)
class Losses:
    """Numbers of values of one tensor, or of a part of it."""

    infinite: int = 0
    """Finite values that became infinite."""
    zero: int = 0
    """Values that became zero."""
    subnormal: int = 0
    """Values that have fewer bits than float16's eleven, since they are so small."""

    def __add__(self, other: Losses) -> Losses:
        return Losses(
            self.infinite + other.infinite, self.zero + other.zero, self.subnormal + other.subnormal
        )


def losses(before: torch.Tensor, after: torch.Tensor) -> Losses:
    """Count what rounding ``before`` to ``after``, of the same shape, did; nothing for other dtypes than float16."""
    if after.dtype != torch.float16 or before.dtype == torch.float16:
        return Losses()
    total = Losses()
    chunks = (tensor.reshape(-1).split(_CHUNK_VALUES) for tensor in (before, after))
    for one, two in zip(*chunks, strict=True):
        small = (two.abs() < _SMALLEST_NORMAL) & (one != 0)
        total += Losses(
            int((two.isinf() & one.isfinite()).sum()),
            int((small & (two == 0)).sum()),
            int((small & (two != 0)).sum()),
        )
    return total


@dataclass
class LossReport:
    """The losses by tensor; several threads may add to it, and a slice that is read again counts once."""

    _found: dict[str, dict[object, Losses]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, name: str, slice_of_it: object, found: Losses) -> None:
        """Note one slice of a tensor."""
        with self._lock:
            self._found.setdefault(name, {})[slice_of_it] = found

    def of(self, kind: str) -> dict[str, int]:
        """Number of values by canonical name: ``infinite``, ``zero`` or ``subnormal``; only where there are any."""
        counts = {
            name: sum(getattr(one, kind) for one in slices.values()) for name, slices in self._found.items()
        }
        return {name: count for name, count in counts.items() if count}

    def sentence(self) -> str | None:
        """A warning, or None where nothing was lost."""
        told = [
            f"{sum(counts.values())} values in {len(counts)} tensors {what} "
            f"(most in {max(counts, key=counts.__getitem__)}: {max(counts.values())})"
            for what, counts in (
                ("are beyond ±65504 and became infinite", self.of("infinite")),
                ("became zero", self.of("zero")),
                ("became subnormal, with fewer bits", self.of("subnormal")),
            )
            if counts
        ]
        return f"float16 does not hold every value: {'; '.join(told)}" if told else None
