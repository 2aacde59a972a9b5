"""Attention by blocks of queries against the plain steps: values and all gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mindspeed_lora.device.attention import plain_backward, plain_forward
from mindspeed_lora.device.causal_blocks import blocks_are_faster, blocks_backward, blocks_forward

Tensor = torch.Tensor
SCALE = 0.3


def operands(b: int, s: int, n: int, g: int, dtype: torch.dtype, value_width: int = 8) -> list[Tensor]:
    """Query, key, value and the gradient of the result, heads first, positions first in memory."""
    generator = torch.Generator().manual_seed(s * n * g)
    sizes = ((n, 8), (g, 8), (g, value_width), (n, value_width))
    return [
        torch.randn(s, b, heads, width, generator=generator, dtype=dtype).permute(1, 2, 0, 3)
        for heads, width in sizes
    ]


@pytest.fixture(params=[1, 2, 3, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads of torch, by which the queries of a group are dealt."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("b", "s", "n", "g", "value_width"),
    [
        *((1, 181, 9, 3, 8), (2, 130, 4, 4, 8), (1, 64, 4, 1, 8), (1, 1, 2, 1, 8), (1, 769, 4, 2, 8)),
        *((1, 1100, 16, 4, 8), (2, 181, 6, 3, 5), (1, 130, 4, 4, 11)),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=str)
def test_values_and_gradients(
    b: int, s: int, n: int, g: int, value_width: int, dtype: torch.dtype, tolerance: float
) -> None:
    query, key, value, grad = operands(b, s, n, g, dtype, value_width)
    expected, lse = plain_forward(query, key, value, True, None, SCALE)
    out = torch.empty_like(grad)
    blocks_forward(query, key, value, SCALE, out)
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
    wanted = plain_backward(grad, (query, key, value), expected, lse, True, None, SCALE)
    found = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    blocks_backward(grad, (query, key, value), out, SCALE, found)
    for gradient, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=0, atol=tolerance)


def test_a_later_key_changes_nothing() -> None:
    query, key, value, _ = operands(1, 200, 4, 2, torch.float32)
    whole, changed = torch.empty_like(query), torch.empty_like(query)
    blocks_forward(query, key, value, SCALE, whole)
    key[:, :, 150:], value[:, :, 150:] = 50.0, 1e6
    blocks_forward(query, key, value, SCALE, changed)
    assert torch.equal(whole[:, :, :150], changed[:, :, :150])
    assert not torch.equal(whole[:, :, 150:], changed[:, :, 150:])


def test_which_rows_they_are_for() -> None:
    def query(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(1, 2, length, 8, dtype=dtype)

    assert [blocks_are_faster(query(length)) for length in (64, 128, 2048, 2049)] == [
        False,
        True,
        True,
        False,
    ]
    assert not blocks_are_faster(query(256, torch.bfloat16))
