"""The C function gives bitsandbytes' codes, and what needs no compiler gives the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch

from mindspeed_lora.quantization import encoding, native

BLOCK_SIZES = (32, 64, 4096)


@pytest.fixture(autouse=True)
def _built_anew() -> Iterator[None]:
    def forget() -> None:
        native._library.cache_clear()
        native.block_encoder.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_WORTH_BUILDING", 0)
    if native.block_encoder("nf4") is None:
        pytest.skip("no C compiler here")


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """Random ones; zeros of both signs, one subnormal, the largest and the smallest in a block; midpoints."""
    drawn = torch.randn(3 * 2**18 + 1357, generator=torch.Generator().manual_seed(1))
    drawn[:64] = 0.0
    drawn[64:128] = -0.0
    drawn[128:192] = 1e-40
    drawn[192] = torch.finfo(dtype).max
    drawn[4096:8192] = torch.linspace(-1, 1, 4096)
    return drawn.to(dtype)


@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_are_those_of_bitsandbytes(kind: str, block_size: int, dtype: torch.dtype) -> None:
    given = numbers(dtype)
    expected, state = bnb.quantize_4bit(given.clone(), blocksize=block_size, quant_type=kind)
    codes, absmax = encoding.encode_four_bits(given, kind, block_size)
    assert torch.equal(absmax.view(torch.int32), state.absmax.view(torch.int32))
    assert torch.equal(codes, expected)


@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_in_the_magnitude(wrong: float) -> None:
    given = torch.ones(2**18)
    given[1000] = wrong
    _, absmax = encoding.encode_four_bits(given, "nf4", 64)
    assert (~torch.isfinite(absmax)).nonzero().tolist() == [[1000 // 64]]


@pytest.mark.parametrize("compiler", ["none", "fails", "writes something else"])
def test_without_a_compiler_the_codes_are_the_same(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = {
        "none": None,
        "fails": "exit 1",
        "writes something else": 'while [ "$1" != -o ]; do shift; done; echo > "$2"',
    }
    if script[compiler] is not None:
        cc = tmp_path / "cc"
        cc.write_text(f"#!/bin/sh\n{script[compiler]}\n")
        cc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(encoding, "_WORTH_BUILDING", 0)
    assert native.block_encoder("nf4") is None
    given = numbers(torch.float32)
    expected, _ = bnb.quantize_4bit(given.clone(), blocksize=64, quant_type="nf4")
    assert torch.equal(encoding.encode_four_bits(given, "nf4", 64)[0], expected)


def test_an_unwritable_cache_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native.block_encoder("nf4") is None
