"""Child process: what a step of ours would take if it did its products and its attention and nothing else.

Each is measured alone, on the device, in the shapes of the real micro-batches of one step, at its fastest. The
products are those that are really done: the output layer where there is loss, no input gradient below the first
adapter.
"""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from comparison.product_peak import best_product, fastest, product_seconds
from mindspeed_lora.checkpoint.canonical import linear_shapes
from mindspeed_lora.config.commands import parse
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.data.batch import Batch
from mindspeed_lora.device.attention import rows_at_once
from mindspeed_lora.models.attention_tiles import attention_tiles
from mindspeed_lora.models.tiled_attention import tiled_attention
from mindspeed_lora.training.plan import plan_training
from mindspeed_lora.training.reporting.model_flops import ModelFlops

_CUDA_SQUARE = (8192, 8192, 8192)


class Predictor:
    """Seconds of one micro-batch's parts."""

    def __init__(self, shape: ModelShape, rank: int, dtype: torch.dtype, device: str) -> None:
        self.shape = shape
        self.rank = rank
        self.dtype = dtype
        self.device = device
        self.product = lru_cache(maxsize=None)(lambda size: product_seconds(size, dtype, device))

    def products(self, tokens: int, loss_tokens: int) -> float:
        """Linears with their adapters, forward and backward, and the output layer."""
        total, r = 0.0, self.rank
        for name, (out, into) in linear_shapes(self.shape).items():
            layers = self.shape.num_layers
            # The first adapted linear needs no gradient of its input.
            below = layers - 1 if name == "linear_qkv" else layers
            forward = [(tokens, into, out), (tokens, into, r), (tokens, r, out)]
            factors = [(tokens, out, r), (r, tokens, into), (out, tokens, r)]
            total += layers * sum(map(self.product, [*forward, *factors]))
            total += below * sum(map(self.product, [(tokens, out, into), (tokens, r, into)]))
        hidden, vocabulary = self.shape.hidden_size, self.shape.vocab_size
        if loss_tokens:
            total += self.product((loss_tokens, hidden, vocabulary))
            total += self.product((loss_tokens, vocabulary, hidden))
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
    sizes = [(out, into) for out, into in linear_shapes(plan.shape).values()]
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
        "flop_per_token": flops.per_token,
        "flop_per_token_and_length": flops.per_token_and_length,
    }
    Path(request["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
