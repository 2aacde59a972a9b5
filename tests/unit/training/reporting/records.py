"""Records that the tests of this folder feed in."""

from __future__ import annotations

from typing import Any

from mindspeed_lora.training.reporting import StepRecord


def step_record(iteration: int = 1, **changes: Any) -> StepRecord:
    """A step of 8 rows and 1,000 tokens in a quarter of a second; the loss falls with the iteration."""
    values: dict[str, Any] = {
        "iteration": iteration,
        "consumed_samples": 8 * iteration,
        "lm_loss": 2.0 + 1.0 / iteration,
        "grad_norm": 1.2344,
        "learning_rate": 1e-4,
        "tokens": 1000,
        "loss_tokens": 400,
        "elapsed_ms": 250.0,
        "peak_memory_bytes": 3 * 2**29,
    }
    return StepRecord(**(values | changes))
