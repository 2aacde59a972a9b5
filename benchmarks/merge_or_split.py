"""When it pays to form W + s · BA: one linear with an adapter on one device, by tokens, and what the cost model says.

    python benchmarks/merge_or_split.py --json merge_or_split.json
    python benchmarks/merge_or_split.py --shapes llama-2-7b --tokens 64 512 --device cpu

Forward and backward pass of one rank's shard, TP 1 (the case in which nothing is sent), merged and split.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from comparison.product_peak import fastest, product_seconds
from comparison.table import table

from mindspeed_lora.adapters.schedules.cost import Device, LinearShape, best, candidates
from mindspeed_lora.adapters.schedules.one_collective import begin_column
from mindspeed_lora.adapters.side_branch import Parts, RowBlock, SideBranch
from mindspeed_lora.parallel.overlap import TokenAxis

SHAPES = {
    "tiny": {"linear_qkv": (64, 96), "linear_fc2": (96, 64)},
    "llama-2-7b": {
        "linear_qkv": (4096, 12288),
        "linear_proj": (4096, 4096),
        "linear_fc1": (4096, 22016),
        "linear_fc2": (11008, 4096),
    },
    "llama-2-70b": {
        "linear_qkv": (8192, 10240),
        "linear_proj": (8192, 8192),
        "linear_fc1": (8192, 57344),
        "linear_fc2": (28672, 8192),
    },
}
"""Inputs and outputs of each linear."""
_TOKENS = (256, 1024, 4096, 16384)
_RANK = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    options = _parser().parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        rows = _rows(options.shapes, options.tokens, dtype, device)
    finally:
        dist.destroy_process_group()
    heading = ["", "tokens", "split, ms", "merged, ms", "split / merged", "cost model"]
    shown = [
        [
            row["linear"],
            str(row["tokens"]),
            f"{1e3 * row['split_seconds']:.2f}",
            f"{1e3 * row['merged_seconds']:.2f}",
            f"{row['split_seconds'] / row['merged_seconds']:.2f}",
            "merge" if row["model_merges"] else "split",
        ]
        for row in rows
    ]
    print(table(heading, shown))
    if options.json is not None:
        options.json.write_text(
            json.dumps({"device": device, "dtype": str(dtype), "rows": rows}, indent=1) + "\n"
        )
    return 0


def _rows(
    shapes: Sequence[str], tokens: Sequence[int], dtype: torch.dtype, device: str
) -> list[dict[str, Any]]:
    found = []
    for name in shapes:
        for linear, (inside, out) in SHAPES[name].items():
            speeds = _speeds(inside, out, dtype, device)
            found += [
                _measured(f"{name} {linear}", inside, out, count, dtype, device, speeds) for count in tokens
            ]
    return found


def _speeds(inside: int, out: int, dtype: torch.dtype, device: str) -> Device:
    tokens = 4096 if device == "cuda" else 512
    product = product_seconds((tokens, inside, out), dtype, device)
    x, y = (torch.zeros(1 << 24, dtype=dtype, device=device) for _ in range(2))
    added = fastest(lambda: y.add_(x), device)
    moved = 3.0 * y.numel() * y.element_size()
    return Device(2.0 * tokens * inside * out / product, moved / added, math.inf, 0.0)


def _measured(
    linear: str, inside: int, out: int, tokens: int, dtype: torch.dtype, device: str, speeds: Device
) -> dict[str, Any]:
    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device).to(dtype)

    x, weight, grad = drawn(tokens, 1, inside).requires_grad_(), drawn(out, inside), drawn(tokens, 1, out)
    factors = [drawn(_RANK, inside).requires_grad_(), drawn(out, _RANK).requires_grad_()]
    branch = SideBranch(Parts((RowBlock(0, out),), (2.0,)), factors)
    world = dist.group.WORLD
    assert world is not None
    axis = TokenAxis(world, 1, 0, False)

    def run(merge: bool) -> Callable[[], object]:
        return lambda: torch.autograd.grad(
            begin_column(x, weight, branch, axis, merge)(), [x, *factors], grad
        )

    shape = LinearShape(True, tokens, inside, out, _RANK, 1, False, dtype.itemsize)
    chosen = best(candidates(None, None, None), shape, speeds)
    return {
        "linear": linear,
        "tokens": tokens,
        "split_seconds": fastest(run(False), device),
        "merged_seconds": fastest(run(True), device),
        "model_merges": chosen.merges(tokens),
    }


def _parser() -> argparse.ArgumentParser:
    description, _, _ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["llama-2-7b", "llama-2-70b"])
    add("--tokens", type=int, nargs="+", default=_TOKENS)
    add("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    add("--json", type=Path, metavar="FILE", help="also write everything to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
