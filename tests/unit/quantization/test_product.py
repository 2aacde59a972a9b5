"""Products with quantised weights against products with their dequantised values."""

from __future__ import annotations

import pytest
import torch

from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.quantization import product as module
from mindspeed_lora.quantization.matrix import quantize
from mindspeed_lora.quantization.product import input_product, product, ready
from mindspeed_lora.quantization.runs import Piece
from mindspeed_lora.quantization.shard import QuantizedWeight


@pytest.fixture(autouse=True)
def _own_buffers(monkeypatch):
    monkeypatch.setattr(module, "_buffers", {})


def make_weight(
    rows: int = 37, columns: int = 64, dtype: torch.dtype = torch.float32, kind: str = "nf4"
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(rows)
    matrix = quantize(torch.randn(rows, columns, generator=generator), QuantSettings(kind, 64, True), "w")
    return QuantizedWeight.from_matrices([matrix], [Piece(0, (0, rows), (0, columns))], matrix.shape, dtype)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [64 << 20, 5 * 64 * 4, 1])
def test_products_are_those_of_the_dequantised_weight(monkeypatch, kind, dtype, budget):
    """Exact where the weight is whole; else float32 sums in another order, and of bfloat16 one rounding a tile."""
    monkeypatch.setattr(module, "TILE_BYTES", budget)
    weight = make_weight(dtype=dtype, kind=kind)
    dense = weight.dense()
    x, grad = torch.randn(11, 64).to(dtype), torch.randn(11, 37).to(dtype)
    y, dx = torch.empty(11, 37, dtype=dtype), torch.empty(11, 64, dtype=dtype)
    product(x, weight, y)
    input_product(grad, weight, dx)
    if budget > dense.nbytes:
        assert torch.equal(y, x @ dense.t()) and torch.equal(dx, grad @ dense)
        return
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y, x @ dense.t(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dx.float(), grad.float() @ dense.float(), rtol=tolerance, atol=10 * tolerance)


def test_outputs_may_be_rows_and_columns_of_larger_tensors(monkeypatch):
    weight, x, grad = make_weight(), torch.randn(6, 64), torch.randn(6, 80)
    for budget in (64 << 20, 4 * 64 * 4):
        monkeypatch.setattr(module, "TILE_BYTES", budget)
        y, dx = torch.zeros(10, 50), torch.zeros(10, 70)
        product(x, weight, y[2:8, 5:42])
        input_product(grad[:, 3:40], weight, dx[2:8, 1:65])
        torch.testing.assert_close(y[2:8, 5:42], x @ weight.dense().t())
        torch.testing.assert_close(dx[2:8, 1:65], grad[:, 3:40] @ weight.dense())
        assert y.count_nonzero() == 6 * 37 and dx.count_nonzero() == 6 * 64


def test_one_buffer_serves_all_weights_of_a_dtype():
    large, small = make_weight(64), make_weight(16)
    first = ready(large)
    assert torch.equal(first, large.dense())
    second = ready(small)
    assert second.data_ptr() == first.data_ptr() and torch.equal(second, small.dense())
    assert len(module._buffers) == 1
    ready(make_weight(16, dtype=torch.bfloat16))
    assert len(module._buffers) == 2


def test_plain_weights_and_large_ones_are_ready_as_they_are(monkeypatch):
    plain, weight = torch.randn(4, 64), make_weight()
    assert ready(plain) is plain
    monkeypatch.setattr(module, "TILE_BYTES", 64)
    assert ready(weight) is weight
    y, dx = torch.empty(3, 4), torch.empty(3, 64)
    x, grad = torch.randn(3, 64), torch.randn(3, 4)
    product(x, plain, y)
    input_product(grad, plain, dx)
    assert torch.equal(y, x @ plain.t()) and torch.equal(dx, grad @ plain)


def test_an_expert_of_a_stack():
    matrices = [quantize(torch.randn(8, 64), QuantSettings("nf4"), "w") for _ in range(3)]
    pieces = [Piece(index, (0, 8), (0, 64)) for index in range(3)]
    stack = QuantizedWeight.from_matrices(matrices, pieces, (3, 8, 64), torch.float32)
    x, y = torch.randn(5, 64), torch.empty(5, 8)
    product(x, stack.expert(2), y)
    assert torch.equal(y, x @ stack.dense()[2].t())
