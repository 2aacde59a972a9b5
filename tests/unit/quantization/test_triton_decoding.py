"""The Triton kernel in Triton's interpreter, and compiled for GPUs that are not there; skipped without Triton.

The interpreter cuts float32 off where it makes bfloat16 of it, so that bfloat16 is left to ``tests/gpu`` and to the
instructions that the compiler chose.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]


def run_in_new_process(function: str, **environment: str) -> None:
    """Triton reads whether to interpret when the kernel is defined."""
    code = f"import tests.unit.quantization.test_triton_decoding as module; module.{function}()"
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment, timeout=250)


def test_interpreted_numbers_are_those_of_the_tables():
    run_in_new_process("compare", TRITON_INTERPRET="1")


def test_compiled_kernel_rounds_to_nearest_and_fuses_nothing():
    run_in_new_process("compile_for_gpus", TRITON_INTERPRET="0")


def compare() -> None:
    from mindspeed_lora.quantization import decoding, triton_decoding

    torch.manual_seed(0)
    for size, block_size, kind in [(64, 64, "nf4"), (2500, 32, "fp4"), (4103, 4096, "nf4")]:
        codes = torch.randint(0, 256, ((size + 1) // 2,), dtype=torch.uint8)
        scales = torch.rand((size + block_size - 1) // block_size)
        for rounding in (torch.float32, torch.float16):
            for dtype in (torch.float32, torch.float16):
                expected, found = torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)
                decoding.decode_blocks(codes, scales, block_size, kind, rounding, expected)
                triton_decoding.decode_blocks(codes, scales, block_size, kind, rounding, found)
                assert torch.equal(found, expected), (size, block_size, kind, rounding, dtype)


def compile_for_gpus() -> None:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mindspeed_lora.quantization import triton_decoding

    pointers = {"codes": "*u8", "scales": "*fp32", "values": "*fp32", "size": "i64"}
    constants = {"BLOCK": 64, "TILE": 1024, "ROUNDING": tl.bfloat16}
    names = triton_decoding._decode.arg_names
    for out, conversion in [("*bf16", "cvt.rn.bf16"), ("*fp32", "cvt.f32.bf16")]:
        signature = {**pointers, "out": out, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(
            fn=triton_decoding._decode,
            signature={name: signature[name] for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
        )
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert "cvt.rn.bf16" in code and conversion in code and not re.search(r"\bfma\b", code)
