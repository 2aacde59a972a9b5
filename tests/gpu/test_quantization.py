"""Quantised weights on the device against the same on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import rank
from tests.support.pool import WorkerPool


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("columns", [(0, 192), (64, 128), (7, 100)], ids=str)
def test_dequantised_numbers_are_the_same_bits(
    device_pool: WorkerPool, workers: WorkerPool, kind: str, columns: tuple[int, int]
) -> None:
    """Whole blocks take the Triton kernel where it can be imported; parts of blocks never do."""
    (found,) = device_pool.run(1, rank.dequantized, kind, columns)
    (expected,) = workers.run(1, rank.dequantized, kind, columns)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_products(device_pool: WorkerPool, workers: WorkerPool) -> None:
    """float32 differs by the order of sums alone."""
    (found,), (expected,) = (
        device_pool.run(1, rank.quantized_products),
        workers.run(1, rank.quantized_products),
    )
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) <= 1e-5
