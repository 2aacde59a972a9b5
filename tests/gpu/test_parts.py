"""Parts of the model on the device against the same on the CPU.

fp32 differs by the order of sums alone (TF32 is off by default, and nothing turns it on): 1e-5 relative. bf16 keeps 8
bits, so that a result is off by up to 2⁻⁸ = 0.4% of itself; a gradient is the end of two such products in a row.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.gpu import rank
from tests.support.pool import WorkerPool

SUB_ROWS = ((7, 20, 5), (30, 2))
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 0.02}
"""Norm of the difference over the norm."""


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor], limit: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) <= limit


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_masks_are_the_same_bits(device_pool: WorkerPool, workers: WorkerPool, p: float) -> None:
    (found,), (expected,) = device_pool.run(1, rank.dropout_mask, p), workers.run(1, rank.dropout_mask, p)
    assert torch.equal(found, expected)
    assert 0 < int(found.sum()) < found.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", [rank.norm, rank.vocabulary_loss, rank.grouped_lora])
def test_part(
    device_pool: WorkerPool,
    workers: WorkerPool,
    part: Callable[[torch.dtype], list[torch.Tensor]],
    dtype: torch.dtype,
) -> None:
    (found,), (expected,) = device_pool.run(1, part, dtype), workers.run(1, part, torch.float32)
    assert_near(found, expected, RELATIVE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("sub_rows", [None, SUB_ROWS], ids=["rows", "packed"])
def test_attention(
    device_pool: WorkerPool,
    workers: WorkerPool,
    sub_rows: tuple[tuple[int, ...], ...] | None,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    (found,) = device_pool.run(1, rank.attention, dtype, sub_rows, window)
    (expected,) = workers.run(1, rank.attention, torch.float32, sub_rows, window)
    assert_near(found, expected, RELATIVE[dtype])


def test_world_of_one(device_pool: WorkerPool) -> None:
    (found,) = device_pool.run(1, rank.world_of_one)
    data = ("nccl", "cuda") if device_pool.cuda else ("gloo", "cpu")
    assert found == (data[0], "gloo", data[1], [1.0, 2.0, 3.0])
