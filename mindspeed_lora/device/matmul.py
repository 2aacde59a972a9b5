"""Matrix products inside of autograd Functions, by the faster of the libraries that torch's CPU build carries.

``torch.matmul`` in float32 calls MKL, which on AMD has no AVX-512 code; oneDNN generates code for the CPU that it
finds. Measured on Zen 4 at a few hundred tokens: 200 to 215 GFLOP/s against 150 to 185. It lays out a weight anew in
every call, in memory of the weight's size, and generates code for every shape, in half a millisecond.
"""

from __future__ import annotations

import os
import platform
from functools import lru_cache

import torch

Tensor = torch.Tensor

_KEPT_SHAPES = 64
"""Shapes whose code is kept: 0.6 MiB each. Either library keeps 1,024 by default."""
_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""What oneDNN, and torch's layer around it, read at their first product."""
_LEAST_OPERATIONS = 1 << 20
"""Multiplications below which the call itself takes longer than the product."""


def matmul_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ`` without autograd, in memory of its own.

    Args:
        x: ``[n, k]``; copied first where it is not contiguous.
        weight: ``[m, k]``, or a transposed view of ``[k, m]``.

    Returns:
        ``[n, m]`` in the dtype of the operands.
    """
    if _is_for_onednn(x, weight):
        # The operation that torch's compiler emits for a linear.
        product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
        return product
    return x @ weight.t()


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype is torch.float32
        and x.device.type == "cpu"
        and x.size(0) * weight.numel() >= _LEAST_OPERATIONS
        and _has_onednn()
    )


@lru_cache
def _has_onednn() -> bool:
    """On other machines than x86 it is torch's own choice whether oneDNN gains anything."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if not (x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    for name in _CAPACITIES:
        os.environ.setdefault(name, str(_KEPT_SHAPES))
    return True
