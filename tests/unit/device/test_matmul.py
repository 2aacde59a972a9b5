"""Products against float64, and which library they go to."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mindspeed_lora.device.matmul import _has_onednn, matmul_transposed

Tensor = torch.Tensor
ONEDNN = "mkldnn::_linear_pointwise"

needs_onednn = pytest.mark.skipif(not _has_onednn(), reason="torch without oneDNN")


def operations(x: Tensor, weight: Tensor) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        matmul_transposed(x, weight)
    return {event.name for event in profiler.events()}


@pytest.mark.parametrize("rows", [0, 1, 7, 129, 300])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("inner", "columns"), [(96, 320), (33, 1001), (576, 64)])
def test_product(rows: int, transposed: bool, strided: bool, inner: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(rows, inner + 8 * strided, generator=generator)[:, :inner]
    weight = torch.randn(columns, inner, generator=generator)
    if transposed:
        weight = weight.t().contiguous().t()
    product = matmul_transposed(x, weight)
    # Rounding of a sum of some hundred terms of size 1.
    torch.testing.assert_close(product, (x.double() @ weight.double().t()).float(), rtol=0, atol=2e-4)
    assert product.is_contiguous()


def test_same_numbers_every_time() -> None:
    x, weight = torch.randn(200, 96), torch.randn(320, 96)
    first = matmul_transposed(x, weight)
    assert all(torch.equal(first, matmul_transposed(x, weight)) for _ in range(20))


@needs_onednn
def test_large_products_go_to_onednn() -> None:
    assert ONEDNN in operations(torch.randn(256, 96), torch.randn(320, 96))
    assert ONEDNN not in operations(torch.randn(2, 96), torch.randn(320, 96))
    assert ONEDNN not in operations(torch.randn(256, 96).double(), torch.randn(320, 96).double())


@needs_onednn
@pytest.mark.parametrize("given", [None, "7"])
def test_few_shapes_are_kept_where_the_user_does_not_say_otherwise(given: str | None) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    environment = {key: value for key, value in os.environ.items() if key != name}
    script = f"""
import os, torch
from mindspeed_lora.device.matmul import matmul_transposed
matmul_transposed(torch.randn(256, 96), torch.randn(320, 96))
print(os.environ[{name!r}])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | ({} if given is None else {name: given}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == (given or "64")
