"""The fastest matrix product of a device, as this process is set up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import torch

SQUARE = (2048, 2048, 2048)
_REPETITIONS = 8
_SECONDS = 1.5
_COPIED = {True: 1 << 30, False: 1 << 28}
"""Bytes that are copied on CUDA and on the CPU: more than caches hold."""


def best_product(
    shapes: Iterable[tuple[int, int, int]],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    square: tuple[int, int, int] = SQUARE,
) -> tuple[float, tuple[int, int, int]]:
    """Highest rate in GFLOP/s over ``square`` and the given ``(rows, inner, columns)``, and the shape that has it.

    The output is allocated before, so that no page fault is counted.
    """
    rates = {
        shape: 2.0 * math.prod(shape) / product_seconds(shape, dtype, device) / 1e9
        for shape in {square, *shapes}
    }
    best = max(rates, key=lambda shape: rates[shape])
    return rates[best], best


def product_seconds(shape: tuple[int, int, int], dtype: torch.dtype, device: str, batch: int = 1) -> float:
    """Shortest time of ``[rows, inner] @ [inner, columns]``, written to memory that is there already.

    ``batch`` such products are done at once.
    """
    rows, inner, columns = shape
    left = torch.randn(batch, rows, inner, device=device).to(dtype)
    right = torch.randn(batch, inner, columns, device=device).to(dtype)
    output = torch.empty(batch, rows, columns, dtype=dtype, device=device)
    if batch == 1:
        left, right, output = left[0], right[0], output[0]
        return fastest(lambda: torch.mm(left, right, out=output), device)
    return fastest(lambda: torch.bmm(left, right, out=output), device)


def copy_rate(device: str) -> float:
    """Bytes a second that the device's memory reads and writes in a copy."""
    source = torch.zeros(_COPIED[device == "cuda"], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / fastest(lambda: target.copy_(source), device)


def fastest(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of several repetitions, after one that is not counted."""
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else _nothing
    work()
    wait()
    best, started = float("inf"), time.perf_counter()
    for _ in range(_REPETITIONS):
        before = time.perf_counter()
        work()
        wait()
        after = time.perf_counter()
        best = min(best, after - before)
        if after - started > _SECONDS:
            break
    return best


def _nothing() -> None:
    """The CPU has done its work when the call returns."""
