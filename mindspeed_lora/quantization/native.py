"""The C function that encodes blocks on CPUs, built by the machine's compiler when it is first asked for.

Calls of PyTorch's operations pass five times as often over the numbers. Without a compiler they do the work: the codes
are the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from mindspeed_lora.quantization.codebooks import four_bit_bounds, four_bit_codes

Tensor = torch.Tensor
Encode = Callable[[Tensor, int, Tensor, Tensor], None]

_SOURCE = Path(__file__).with_name("encode.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-trapping-math", "-fPIC", "-shared")
_SECONDS = 60


@cache
def block_encoder(kind: str) -> Encode | None:
    """What encodes ``numbers [n]`` (float32 or bfloat16, contiguous), in blocks of a size, to absmax and codes.

    None where it cannot be built. Threads may call it at the same time.
    """
    library = _library()
    if library is None:
        return None
    bounds = four_bit_bounds(kind).contiguous()
    order = torch.tensor(four_bit_codes(kind), dtype=torch.uint8)

    def encode(numbers: Tensor, block_size: int, absmax: Tensor, codes: Tensor) -> None:
        library.encode_blocks(
            ctypes.c_void_p(numbers.data_ptr()),
            ctypes.c_int(numbers.dtype == torch.bfloat16),
            ctypes.c_int64(absmax.numel()),
            ctypes.c_int64(block_size),
            ctypes.c_void_p(bounds.data_ptr()),
            ctypes.c_void_p(order.data_ptr()),
            ctypes.c_void_p(absmax.data_ptr()),
            ctypes.c_void_p(codes.data_ptr()),
        )

    return encode


@cache
def _library() -> ctypes.CDLL | None:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None


def _built(compiler: str) -> Path:
    """The library in the user's cache, for this source and processor; made there whole or not at all."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache_home) / "mindspeed_lora" / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    parts = (_SOURCE.read_bytes(), " ".join(_FLAGS).encode(), _processor().encode())
    library = folder / f"{hashlib.sha256(b'|'.join(parts)).hexdigest()[:32]}.so"
    if not library.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as made:
            output = Path(made) / "library.so"
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(output)]
            subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
            os.replace(output, library)
    return library


def _processor() -> str:
    """What ``-march=native`` depends on: home folders are shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    told = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return f"{platform.system()} {platform.machine()} {' '.join(sorted(set(told)))}"
