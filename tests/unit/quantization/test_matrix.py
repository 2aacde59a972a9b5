"""Quantised matrices are bitsandbytes' own, bit for bit.

The reference is bitsandbytes' CPU implementation, called as it is: ``functional.quantize_4bit``, ``dequantize_4bit``,
``int8_vectorwise_quant``, ``int8_vectorwise_dequant``.
"""

from __future__ import annotations

import dataclasses
import math

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.errors import Refused
from mindspeed_lora.quantization.codebooks import (
    dynamic_values,
    four_bit_bounds,
    four_bit_codes,
    four_bit_values,
)
from mindspeed_lora.quantization.matrix import QuantizedMatrix, dequantize, encode_statistics, quantize

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _without_compiler():
    """bitsandbytes compiles its way for rows of odd length, once a shape; the same numbers come without."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if found.is_floating_point():
        integer = {2: torch.int16, 4: torch.int32}[found.element_size()]
        found, expected = found.contiguous().view(integer), expected.contiguous().view(integer)
    assert torch.equal(found, expected), f"{int((found != expected).sum())} of {found.numel()} differ"


def reference_values(matrix: QuantizedMatrix, state: bnb.QuantState, dtype: torch.dtype) -> torch.Tensor:
    state.dtype = dtype
    return bnb.dequantize_4bit(matrix.packed, state).view(matrix.shape)


def check_four_bits(weight: torch.Tensor, kind: str, block_size: int, double: bool) -> None:
    """Codes, statistics and dequantised numbers in all dtypes against bitsandbytes."""
    packed, state = bnb.quantize_4bit(
        weight.clone(), blocksize=block_size, compress_statistics=double, quant_type=kind
    )
    found = quantize(weight, QuantSettings(kind, block_size, double), "weight")
    assert_same_bits(found.packed, packed)
    assert_same_bits(found.absmax, state.absmax)
    if double:
        assert found.nested is not None
        assert_same_bits(found.nested.absmax, state.state2.absmax)
        assert_same_bits(found.nested.offset, state.offset)
        assert state.state2.blocksize == 256
    for dtype in DTYPES:
        expected = reference_values(found, state, dtype)
        # bitsandbytes' kernels make minus zero of FP4's code 8; its way for rows of odd length makes zero.
        decoded = dequantize(dataclasses.replace(found, dtype=dtype), dtype)
        if weight.size(1) % 2 and kind == "fp4":
            assert torch.equal(decoded, expected)
        else:
            assert_same_bits(decoded, expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_tables_are_those_of_the_package(kind):
    assert_same_bits(four_bit_values(kind, CPU) + 0.0, bnb.get_4bit_type(kind, device="cpu"))
    assert_same_bits(dynamic_values(CPU), bnb.create_dynamic_map())
    ordered = four_bit_values(kind, CPU)[list(four_bit_codes(kind))]
    assert (ordered.diff() >= 0).all() and sorted(four_bit_codes(kind)) == list(range(16))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_block_sizes(kind, block_size, double):
    torch.manual_seed(0)
    for shape in [(64, 192), (33, 70), (7, 9), (1, 1), (3, 4096), (130, 131)]:
        check_four_bits(torch.randn(shape), kind, block_size, double)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from(BLOCK_SIZES),
    double=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    scale=st.sampled_from([1e-44, 1e-38, 1e-12, 1.0, 1e4, 3e37]),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_every_shape_and_scale(kind, block_size, double, dtype, rows, columns, scale, zeros, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * scale
    weight[torch.rand(rows, columns, generator=generator) < zeros] = 0
    limit = min(torch.finfo(dtype).max, 3e38)
    # The mean of such magnitudes may overflow: then nested statistics are refused.
    check_four_bits(weight.clamp(-limit, limit).to(dtype), kind, block_size, double and scale < 1e37)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_numbers_at_every_boundary(kind):
    """The floats next to each midpoint of two values, in blocks whose magnitude is one."""
    bounds = four_bit_bounds(kind)
    near = [bounds]
    up = down = bounds
    for _ in range(3):
        up, down = up.nextafter(torch.tensor(2.0)), down.nextafter(torch.tensor(-2.0))
        near += [up, down]
    numbers = torch.cat([torch.cat([torch.tensor([sign]), part]) for part in near for sign in (1.0, -1.0)])
    check_four_bits(torch.nn.functional.pad(numbers.view(-1, 16), (0, 48)), kind, 64, False)


def test_statistics_at_every_boundary():
    """Magnitudes around every threshold of the dynamic map, and those whose reciprocal is infinite."""
    middle = (dynamic_values(CPU)[:-1] + dynamic_values(CPU)[1:]) / 2
    steps = torch.arange(-4, 5) * 1.0e-5
    numbers = (middle.unsqueeze(1) + steps).flatten()
    blocks = torch.nn.functional.pad(numbers, (0, -numbers.numel() % 255)).view(-1, 255)
    numbers = torch.cat([torch.ones(blocks.size(0), 1), blocks], dim=1).flatten()
    for scale in (1.0, 3.7, 1e-39, 1e-45, 0.0):
        codes, nested = encode_statistics(numbers * scale)
        expected, state = bnb.quantize_blockwise(numbers * scale - nested.offset, blocksize=256)
        assert_same_bits(codes, expected)
        assert_same_bits(nested.absmax, state.absmax)


def test_a_matrix_of_many_blocks():
    """Enough magnitudes that torch shares their sum among threads, if bitsandbytes may use several."""
    weight = torch.randn(1500, 1600, generator=torch.Generator().manual_seed(2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        check_four_bits(weight, "nf4", 64, True)
    finally:
        torch.set_num_threads(threads)


def test_offset_does_not_depend_on_threads():
    """The mean of enough magnitudes that torch would share the sum among threads."""
    absmax = torch.rand(100_000, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    offsets = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            offsets.append(encode_statistics(absmax)[1].offset.item())
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert len(set(offsets)) == 1


def test_numbers_are_rounded_to_the_quantised_dtype_first():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    found = dequantize(quantize(weight, QuantSettings("nf4"), "weight"), torch.float32)
    assert_same_bits(found, bnb.dequantize_4bit(packed, state).float())
    assert not torch.equal(
        found, dequantize(quantize(weight.float(), QuantSettings("nf4"), "weight"), torch.float32)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_rows(dtype):
    torch.manual_seed(0)
    for shape in [(64, 192), (7, 9), (1, 1), (33, 4097)]:
        weight = (torch.randn(shape) * 3).to(dtype)
        weight[0, : shape[1] // 2] = 0
        weight[-1] = 0
        expected, magnitudes, _ = bnb.int8_vectorwise_quant(weight)
        found = quantize(weight, QuantSettings("int8"), "weight")
        assert_same_bits(found.packed, expected)
        assert_same_bits(found.absmax, magnitudes)
        for wanted in DTYPES:
            values = bnb.int8_vectorwise_dequant(expected, magnitudes).to(wanted)
            assert_same_bits(dequantize(found, wanted), values)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(kind, bad):
    for row, column in [(0, 0), (20, 99), (4, 30)]:
        weight = torch.randn(21, 100)
        weight[row, column] = bad
        with pytest.raises(Refused, match=rf"layers\.3\.q holds NaN or inf.*row {row}, column {column} is"):
            quantize(weight, QuantSettings(kind, 64, True), "layers.3.q")


def test_magnitudes_whose_mean_overflows_are_refused():
    weight = torch.full((4, 64), 3e38)
    assert torch.equal(dequantize(quantize(weight, QuantSettings("nf4"), "w"), torch.float32), weight)
    with pytest.raises(Refused, match=r"w holds values up to 3e\+38.*leave out --quant-double"):
        quantize(weight, QuantSettings("nf4", 64, True), "w")


def test_integers_are_refused():
    with pytest.raises(Refused, match="w has dtype int8; quantising takes float32"):
        quantize(torch.ones(2, 2, dtype=torch.int8), QuantSettings("nf4"), "w")
