"""Child process: what a step of ours would take if it did its products and its attention and nothing else.

Each is measured alone, on the device, in the shapes of the real micro-batches of one step, at its fastest. The
products are those that are really done: the output layer where there is loss, no input gradient below the first
adapter.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from comparison.product_peak import best_product, copy_rate, fastest, product_seconds
from mindspeed_lora.checkpoint.canonical import expert_number, layer_linears
from mindspeed_lora.config.commands import parse
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.data.batch import Batch
from mindspeed_lora.device.attention import rows_at_once
from mindspeed_lora.models.attention_tiles import attention_tiles
from mindspeed_lora.models.tiled_attention import tiled_attention
from mindspeed_lora.training.plan import plan_training
from mindspeed_lora.training.reporting.model_flops import ModelFlops

_CUDA_SQUARE = (8192, 8192, 8192)


@dataclass(frozen=True)
class Linear:
    """A linear of a layer, or that of all of its experts."""

    size: tuple[int, int]
    """``(out, in)``."""
    experts: int
    """That have such a one, each with its share of the tokens; 1: all tokens go through it."""
    is_first: bool
    """The first of all adapted linears needs no gradient of its input."""


def linears(shape: ModelShape) -> list[Linear]:
    """Of all layers, in the order of the forward pass."""
    found: list[Linear] = []
    for layer in range(shape.num_layers):
        for place, size in layer_linears(shape, layer).items():
            number = expert_number(place)
            if number is None or number == 0:
                of_experts = number == 0 and shape.moe is not None
                count = shape.moe.num_experts if of_experts and shape.moe is not None else 1
                found.append(Linear(size, count, is_first=not found))
    return found


class Predictor:
    """Seconds of one micro-batch's parts."""

    def __init__(self, shape: ModelShape, rank: int, dtype: torch.dtype, device: str) -> None:
        self.shape = shape
        self.rank = rank
        self.dtype = dtype
        self.device = device
        self.linears = linears(shape)
        self.topk = 1 if shape.moe is None else shape.moe.topk
        self.product = lru_cache(maxsize=None)(
            lambda size, batch: product_seconds(size, dtype, device, batch)
        )

    @property
    def weight_bytes(self) -> int:
        """Read by one micro-batch: every frozen matrix of the layers in the forward pass, and in the backward one."""
        weights = sum(linear.experts * math.prod(linear.size) for linear in self.linears)
        return 2 * weights * self.dtype.itemsize

    def products(self, tokens: int, loss_tokens: int) -> float:
        """Linears with their adapters, forward and backward, and the output layer."""
        total, r = 0.0, self.rank
        for linear in self.linears:
            (out, into), batch = linear.size, linear.experts
            rows = tokens if batch == 1 else max(1, tokens * self.topk // batch)
            products = [(rows, into, out), (rows, into, r), (rows, r, out)]
            products += [(rows, out, r), (r, rows, into), (out, rows, r)]
            if not linear.is_first:
                products += [(rows, out, into), (rows, r, into)]
            total += sum(self.product(size, batch) for size in products)
        hidden, vocabulary = self.shape.hidden_size, self.shape.vocab_size
        if loss_tokens:
            total += self.product((loss_tokens, hidden, vocabulary), 1)
            total += self.product((loss_tokens, vocabulary, hidden), 1)
        return total

    def attention(self, batch: Batch) -> float:
        """All layers, forward and backward."""
        rows, positions = batch.tokens.shape
        heads, groups, width = (
            self.shape.num_attention_heads,
            self.shape.num_query_groups,
            self.shape.kv_channels,
        )
        query, key, value = (
            torch.randn(positions, rows, n, width, device=self.device).to(self.dtype).requires_grad_()
            for n in (heads, groups, groups)
        )
        tiles = attention_tiles(rows, batch.sub_rows, ((0, positions),), ((0, positions),))
        scale = width**-0.5

        def both_passes() -> None:
            out = rows_at_once(query, key, value, batch.sub_rows, None, scale)
            out = tiled_attention(query, key, value, tiles, scale) if out is None else out.flatten(2)
            torch.autograd.grad(out, (query, key, value), out.detach())

        return self.shape.num_layers * fastest(both_passes, self.device)


def main() -> None:
    """Read the request, measure, write the result."""
    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    plan = plan_training(parse("posttrain", request["flags"]))
    dtype, device = getattr(torch, request["dtype"]), request["device"]
    predictor = Predictor(plan.shape, request["rank"], dtype, device)
    batches = plan.rows.train_batches(0, 1, plan.pad_to, 1).step(request["step"])
    sizes = {linear.size for linear in predictor.linears}
    tokens = batches[0].tokens.numel()
    square = (_CUDA_SQUARE,) if device == "cuda" else ()
    peak, peak_shape = best_product([(tokens, into, out) for out, into in sizes], dtype, device, *square)
    assert plan.adapter is not None
    flops = ModelFlops.of(plan.shape, plan.adapter.spec)
    result = {
        "products_ms": 1e3 * sum(predictor.products(b.tokens.numel(), b.num_loss_tokens) for b in batches),
        "attention_ms": 1e3 * sum(map(predictor.attention, batches)),
        "peak_gflop_per_second": peak,
        "peak_shape": peak_shape,
        "weight_bytes": predictor.weight_bytes * len(batches),
        "copy_bytes_per_second": copy_rate(device),
        "flop_per_token": flops.per_token,
        "flop_per_token_and_length": flops.per_token_and_length,
    }
    Path(request["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
