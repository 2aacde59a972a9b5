"""Floating point operations that the model itself needs, for --log-throughput.

Recomputation, padding and collectives are not counted. A multiply and its add are two operations. Per token
a frozen matrix of N weights costs 4 N (forward, gradient of its input), a trained one 6 N (that of its
weights too); causal attention looks at half of the sequence on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    def of(cls, shape: ModelShape, lora_r: int | None, target_modules: Sequence[str] = ()) -> ModelFlops:
        """The cost for a model; ``lora_r`` None trains all of its parameters.

        ``target_modules`` are Megatron's names of the linears that have an adapter.
        """
        linears = _linears(shape)
        layer = float(sum(rows * columns for rows, columns in linears.values()))
        matrices = shape.num_layers * layer + shape.vocab_size * shape.hidden_size
        if lora_r is None:
            cost = _TRAINED * matrices
        else:
            adapted = sum(sum(linears[name]) for name in target_modules)
            cost = _FROZEN * matrices + _TRAINED * shape.num_layers * lora_r * adapted
        # Two products, queries with keys and weights with values, over half of the row; backward costs twice
        # as much as forward.
        attention = 3 * 2 * 2 * 0.5 * shape.num_layers * shape.proj_input_size
        return cls(per_token=cost, per_token_and_length=attention)

    def operations(self, tokens: int, samples: int) -> float:
        """Operations for so many real tokens in so many rows, taken to be of one length."""
        return tokens * (self.per_token + self.per_token_and_length * tokens / max(1, samples))


def tflops_per_gpu(model: ModelFlops, steps: Sequence[StepRecord], samples: int, world_size: int) -> float:
    """Rate of one device over steps that took ``samples`` rows in all, in 10¹² operations a second."""
    seconds = sum(step.elapsed_ms for step in steps) / 1000.0
    operations = model.operations(sum(step.tokens for step in steps), samples)
    return operations / (seconds * world_size * 1e12) if seconds > 0 else 0.0


def _linears(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Rows and columns of the linears of a layer, unsharded."""
    return {
        "linear_qkv": (shape.qkv_size, shape.hidden_size),
        "linear_proj": (shape.hidden_size, shape.proj_input_size),
        "linear_fc1": (2 * shape.ffn_hidden_size, shape.hidden_size),
        "linear_fc2": (shape.hidden_size, shape.ffn_hidden_size),
    }
