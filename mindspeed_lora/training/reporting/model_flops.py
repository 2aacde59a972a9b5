"""Floating point operations that the model itself needs, for --log-throughput.

Recomputation, padding and collectives are not counted. A multiply and its add are two operations. Per token
a frozen matrix of N weights costs 4 N (forward, gradient of its input), a trained one 6 N (that of its
weights too); causal attention looks at half of the sequence on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mindspeed_lora.adapters.spec import AdapterSpec
from mindspeed_lora.checkpoint.canonical import EMBEDDING, ROUTER, adapter_linears, expert_number
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.training.reporting.records import StepRecord

_TRAINED = 6.0
_FROZEN = 4.0


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """Operations of one token of training: ``per_token + per_token_and_length × (length of its row)``."""

    per_token: float
    per_token_and_length: float

    @classmethod
    def of(cls, shape: ModelShape, adapter: AdapterSpec | None) -> ModelFlops:
        """The cost for a model with an adapter; None trains all of its parameters."""
        linears = {**adapter_linears(shape), **_routers(shape)}
        matrices = _active_weights(shape, linears) + shape.vocab_size * shape.hidden_size
        if adapter is None:
            cost = _TRAINED * matrices
        else:
            factors = _active_weights(shape, adapter.tensors)
            # The embedding is looked up; only where it is also the output layer is it a product.
            weights = [
                t
                for t in adapter.trained
                if len(t.size) > 1 and (t.name != EMBEDDING or len(t.members[0]) > 1)
            ]
            trained = sum(rows * columns for rows, columns in (tensor.size for tensor in weights))
            cost = _FROZEN * matrices + _TRAINED * factors + (_TRAINED - _FROZEN) * trained
        # Two products, queries with keys and weights with values, over half of the row; backward costs twice
        # as much as forward.
        head = shape.kv_channels + shape.proj_input_size // shape.num_attention_heads
        attention = 3 * 2 * 0.5 * shape.num_layers * shape.num_attention_heads * head
        return cls(per_token=cost, per_token_and_length=attention)

    def operations(self, tokens: int, samples: int) -> float:
        """Operations for so many real tokens in so many rows, taken to be of one length."""
        return tokens * (self.per_token + self.per_token_and_length * tokens / max(1, samples))


def _active_weights(shape: ModelShape, matrices: Mapping[str, tuple[int, int]]) -> float:
    """Weights that one token goes through: of the experts those that it takes, on average."""
    share = 1.0 if shape.moe is None else shape.moe.topk / shape.moe.num_experts
    return sum(
        rows * columns * (1.0 if expert_number(name) is None else share)
        for name, (rows, columns) in matrices.items()
    )


def _routers(shape: ModelShape) -> dict[str, tuple[int, int]]:
    if shape.moe is None:
        return {}
    size = shape.moe.num_experts, shape.hidden_size
    return {
        f"decoder.layers.{layer}.{ROUTER}": size
        for layer in range(shape.num_layers)
        if shape.has_experts(layer)
    }


def tflops_per_gpu(model: ModelFlops, steps: Sequence[StepRecord], samples: int, world_size: int) -> float:
    """Rate of one device over steps that took ``samples`` rows in all, in 10¹² operations a second."""
    seconds = sum(step.elapsed_ms for step in steps) / 1000.0
    operations = model.operations(sum(step.tokens for step in steps), samples)
    return operations / (seconds * world_size * 1e12) if seconds > 0 else 0.0
