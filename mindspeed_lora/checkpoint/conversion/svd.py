"""The best approximation of a matrix by one of rank r, as factors of an adapter.

Up to ``EXACT_SIZE`` rows or columns by the full singular value decomposition; above it by subspace iteration from a
fixed random start (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4), with ``OVERSAMPLING`` more
directions than r and ``ITERATIONS`` rounds: a matrix of rank r is found to float32 rounding, and of any other the norm
that is captured falls short of the best by a share of about ``(σ_k / σ_r)^(4·ITERATIONS + 2)``, k = r + OVERSAMPLING,
of what the last directions hold.
"""

from __future__ import annotations

import torch

EXACT_SIZE = 768
OVERSAMPLING = 32
ITERATIONS = 4


def low_rank_factors(
    matrix: torch.Tensor, rank: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A ``[r, in]``, B ``[out, r]`` with ``scaling·B·A`` nearest to ``matrix`` ``[out, in]``, and ``‖scaling·B·A‖²``.

    Both carry the square root of each singular value; where r is more than the matrix has, the rest is zero.
    """
    left, values, right = _decompose(matrix, rank)
    root = (values / scaling).sqrt()
    lora_a, lora_b = matrix.new_zeros(rank, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], rank)
    lora_a[: len(values)] = root[:, None] * right
    lora_b[:, : len(values)] = left * root
    return lora_a, lora_b, float(values.double().square().sum())


def _decompose(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[out, k]``, ``[k]`` and ``[k, in]`` of the k ≤ r largest singular values."""
    size = min(matrix.shape)
    if size <= EXACT_SIZE or rank + OVERSAMPLING >= size:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        left, values, right = _subspace_iteration(matrix, rank + OVERSAMPLING)
    return left[:, :rank], values[:rank], right[:rank]


def _subspace_iteration(matrix: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    start = torch.randn(matrix.shape[1], size, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ start)[0]
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, values, right
