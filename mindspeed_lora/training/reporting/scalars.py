"""The numbers of a step and of an evaluation under the names that Megatron gives them."""

from __future__ import annotations

from mindspeed_lora.training.reporting.iteration_line import perplexity
from mindspeed_lora.training.reporting.records import EvaluationRecord, StepRecord

Scalars = dict[str, float]


def step_scalars(record: StepRecord, global_batch_size: int) -> tuple[Scalars, Scalars]:
    """Of a step: those that Megatron shows over consumed samples too, and the others."""
    loss = {} if record.skipped else {"lm loss": record.lm_loss}
    by_both = {"learning-rate": record.learning_rate, "grad-norm": record.grad_norm, **loss}
    by_iteration = {
        "batch-size": float(global_batch_size),
        "loss-scale": record.loss_scale,
        "iteration-time": record.elapsed_ms / 1000.0,
        "tokens-per-second": record.tokens_per_second,
        "mem-max-allocated-bytes": float(record.peak_memory_bytes),
    }
    return by_both, by_iteration


def evaluation_scalars(record: EvaluationRecord) -> Scalars:
    """Of an evaluation; all of them are shown over consumed samples too."""
    loss = record.eval_loss
    name = "lm loss validation" if record.part == "eval" else "lm loss test"
    return {name: loss, f"{name} ppl": perplexity(loss)}
