"""Megatron's lines for iterations and evaluations, which people's scripts parse.

The fields up to ``number of nan iterations`` have Megatron's names, order and widths; ours follow behind
them in the same ``name: value |`` form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime

from mindspeed_lora.training.reporting.records import EvaluationRecord, StepRecord

GIB = 1024.0**3

_LARGEST_EXPONENT = 20.0
"""Megatron's bound on the loss of which it shows the perplexity."""


def iteration_line(
    steps: Sequence[StepRecord],
    total_steps: int,
    global_batch_size: int,
    moment: datetime,
    tflops_per_gpu: float | None = None,
) -> str:
    """The line for an interval of steps: means of loss and time over it, the rest as of its last step.

    The loss is averaged over the steps that were not skipped, and left out if there is none, as in Megatron.
    """
    last = steps[-1]
    elapsed_ms = sum(step.elapsed_ms for step in steps)
    advanced = [step.lm_loss for step in steps if not step.skipped]
    fields = [
        f"iteration {last.iteration:8d}/{total_steps:8d}",
        f"consumed samples: {last.consumed_samples:12d}",
        f"elapsed time per iteration (ms): {elapsed_ms / len(steps):.1f}",
    ]
    if tflops_per_gpu is not None:
        # A CPU makes thousandths.
        digits = 1 if tflops_per_gpu >= 1 else 4
        fields.append(f"throughput per GPU (TFLOP/s/GPU): {tflops_per_gpu:.{digits}f}")
    fields.append(f"learning rate: {last.learning_rate:.6E}")
    fields.append(f"global batch size: {global_batch_size:5d}")
    if advanced:
        fields.append(f"lm loss: {math.fsum(advanced) / len(advanced):.6E}")
    # Megatron's place for them.
    fields += [f"{name}: {loss:.6E}" for name, loss in last.router_losses.items()]
    fields += [
        f"loss scale: {last.loss_scale:.1f}",
        f"grad norm: {last.grad_norm:.3f}",
        f"number of skipped iterations: {sum(step.skipped for step in steps):3d}",
        f"number of nan iterations: {sum(_is_nan(step) for step in steps):3d}",
        f"tokens per second: {interval_rate(sum(step.tokens for step in steps), elapsed_ms):.1f}",
        f"peak memory (GiB): {max(step.peak_memory_bytes for step in steps) / GIB:.2f}",
    ]
    return f" [{moment:%Y-%m-%d %H:%M:%S}] " + " | ".join(fields) + " |"


def evaluation_lines(record: EvaluationRecord) -> list[str]:
    """Megatron's framed lines for an evaluation."""
    what = "validation" if record.part == "eval" else "test"
    text = f" {what} loss at iteration {record.iteration} | lm loss value: {record.eval_loss:.6E} | "
    text += f"lm loss PPL: {perplexity(record.eval_loss):.6E} | "
    frame = "-" * (len(text) + 1)
    return [frame, text, frame]


def perplexity(loss: float) -> float:
    """``exp(loss)``, bounded as Megatron bounds it."""
    return math.exp(min(_LARGEST_EXPONENT, loss))


def interval_rate(amount: float, elapsed_ms: float) -> float:
    """An amount by the second."""
    return 1000.0 * amount / elapsed_ms if elapsed_ms > 0 else 0.0


def _is_nan(step: StepRecord) -> bool:
    """Whether the loss is one that counts as a nan iteration: infinite, or not a number."""
    return not math.isfinite(step.lm_loss)
