"""Products of rows with the matrix of their expert, rows being ordered by expert: grouped GEMMs.

CUDA runs ``torch.nn.functional.grouped_mm``, one kernel for all experts, which the host does not wait for. On the CPU
one product an expert into the rows of one output is faster than it, and takes every dtype.

Letters: R rows, e experts, ``offsets [e]`` int32 where the rows of each end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from mindspeed_lora.quantization.product import TILE_BYTES, Frozen, input_product, product, ready
from mindspeed_lora.quantization.shard import QuantizedWeight

Tensor = torch.Tensor

_ALIGNMENT = 16
"""Bytes of which the kernel's strides are multiples."""


def grouped_rows(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """``rows[i] @ matrices[expert of i]``: ``[R, m]`` of ``[R, n]`` and ``[e, n, m]``."""
    if rows.device.type == "cpu":
        output = rows.new_empty(rows.size(0), matrices.size(2))
        for expert, some in enumerate(_slices(offsets)):
            torch.mm(rows[some], matrices[expert], out=output[some])
        return output
    width = matrices.size(2)
    if rows.size(0) == 0:
        return rows.new_empty(0, width)
    rows, matrices = _aligned(rows, 1), _aligned(_aligned(matrices, 1), 2)
    return F.grouped_mm(rows, matrices, offs=offsets)[:, :width]


def expert_products(rows: Tensor, weight: Frozen, offsets: Tensor) -> Tensor:
    """``x_i W_eᵀ``, e the expert of row i: ``[R, out]`` of ``[R, in]`` and ``[e, out, in]``, plain or quantised."""
    if not isinstance(weight, QuantizedWeight):
        return grouped_rows(rows, weight.transpose(1, 2), offsets)
    output = rows.new_empty(rows.size(0), weight.size(1))
    if rows.device.type == "cpu":
        for expert, some in _computed(offsets):
            product(rows[some], ready(weight.expert(expert)), output[some])
        return output
    for some, tile in _tiles(weight):
        output[:, some] = grouped_rows(rows, tile.transpose(1, 2), offsets)
    return output


def expert_input_products(grad: Tensor, weight: Frozen, offsets: Tensor) -> Tensor:
    """``g_i W_e``: ``[R, in]`` of ``[R, out]`` and ``[e, out, in]``, plain or quantised."""
    if not isinstance(weight, QuantizedWeight):
        return grouped_rows(grad, weight, offsets)
    if grad.device.type == "cpu":
        output = grad.new_empty(grad.size(0), weight.size(2))
        for expert, some in _computed(offsets):
            input_product(grad[some], ready(weight.expert(expert)), output[some])
        return output
    # A sum over tiles of W's rows, in float32: the products of half precision round each of them.
    total = grad.new_zeros(grad.size(0), weight.size(2), dtype=torch.float32)
    for some, tile in _tiles(weight):
        total += grouped_rows(grad[:, some], tile, offsets)
    return total.to(grad.dtype)


def _tiles(weight: QuantizedWeight) -> Iterator[tuple[slice, Tensor]]:
    """Rows of all experts' matrices, so many at once as the buffer takes: ``[e, m, in]``."""
    count, out_features, in_features = weight.shape
    step = max(1, TILE_BYTES // (count * in_features * weight.dtype.itemsize))
    for first in range(0, out_features, step):
        some = slice(first, min(first + step, out_features))
        yield some, weight.dense(some)


def add_grouped_rows(output: Tensor, rows: Tensor, matrices: Tensor, offsets: Tensor, scale: float) -> None:
    """Adds ``scale ·`` :func:`grouped_rows` to ``output [R, m]``, which may be a block of columns."""
    if rows.device.type == "cpu":
        for expert, some in enumerate(_slices(offsets)):
            output[some].addmm_(rows[some], matrices[expert], alpha=scale)
    else:
        output.add_(grouped_rows(rows, matrices, offsets), alpha=scale)


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """``leftᵀ right`` over the rows of each expert: ``[e, m, n]`` of ``[R, m]`` and ``[R, n]``."""
    if left.device.type == "cpu":
        output = left.new_empty(offsets.numel(), left.size(1), right.size(1))
        for expert, some in enumerate(_slices(offsets)):
            torch.mm(left[some].t(), right[some], out=output[expert])
        return output
    rows, columns = left.size(1), right.size(1)
    if left.size(0) == 0:
        return left.new_zeros(offsets.numel(), rows, columns)
    left, right = _aligned(left, 1), _aligned(right, 1)
    return F.grouped_mm(left.t(), right, offs=offsets)[:, :rows, :columns]


def _computed(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and these."""
    return ((expert, some) for expert, some in enumerate(_slices(offsets)) if some.start < some.stop)


def _slices(offsets: Tensor) -> Iterator[slice]:
    """The rows of every expert; offsets are on the CPU."""
    first = 0
    for end in offsets.tolist():
        yield slice(first, end)
        first = end


def _aligned(tensor: Tensor, dim: int) -> Tensor:
    """Filled up with zeros where the size of a dimension would make strides that the kernel refuses."""
    missing = -tensor.size(dim) % (_ALIGNMENT // tensor.element_size())
    if missing:
        padding = [0, 0] * (tensor.dim() - 1 - dim) + [0, missing]
        return F.pad(tensor, padding)
    # A block of columns may begin anywhere.
    if tensor.data_ptr() % _ALIGNMENT or any(
        stride != 1 and stride * tensor.element_size() % _ALIGNMENT for stride in tensor.stride()
    ):
        return tensor.contiguous()
    return tensor
