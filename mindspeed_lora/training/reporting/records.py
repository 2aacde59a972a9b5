"""What the training loop tells of one step and of one evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step of the whole job: sums over the global batch, not over one rank's share."""

    iteration: int
    """Number of the step, from 1."""
    consumed_samples: int
    """Rows taken from the data since the run began, this step's included."""
    lm_loss: float
    """Mean over the loss-carrying tokens of the global batch, before this step's update."""
    grad_norm: float
    """Global norm before clipping."""
    learning_rate: float
    """The one used in this step."""
    tokens: int
    """Real (non-padding) tokens of the global batch."""
    loss_tokens: int
    """Tokens of the global batch that carry loss."""
    elapsed_ms: float
    """Wall time of this iteration alone."""
    peak_memory_bytes: int
    """Largest peak over the ranks."""
    loss_scale: float = 1.0
    skipped: bool = False
    """Whether the parameters were left as they are: an overflow, or a batch without a loss-carrying token."""
    router_losses: Mapping[str, float] = field(default_factory=dict)
    """The auxiliary losses of a mixture of experts by name, without their coefficients."""

    @property
    def tokens_per_second(self) -> float:
        """Real tokens of the global batch by the wall time of the iteration."""
        return 1000.0 * self.tokens / self.elapsed_ms if self.elapsed_ms > 0 else 0.0

    def metrics(self) -> dict[str, Any]:
        """The line of ``metrics.jsonl``; ``skipped`` is there only when the step was, losses of routers if any."""
        line = {
            "iteration": int(self.iteration),
            "lm_loss": _number(self.lm_loss),
            "grad_norm": _number(self.grad_norm),
            "learning_rate": _number(self.learning_rate),
            "tokens": int(self.tokens),
            "loss_tokens": int(self.loss_tokens),
            "tokens_per_second": _number(self.tokens_per_second),
            "elapsed_ms": _number(self.elapsed_ms),
            "peak_memory_bytes": int(self.peak_memory_bytes),
        }
        line |= {name: _number(loss) for name, loss in self.router_losses.items()}
        return line | {"skipped": True} if self.skipped else line


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation after a step."""

    iteration: int
    """The last step before the evaluation; 0 before the first."""
    eval_loss: float
    """Mean over the loss-carrying tokens of the validation part."""
    eval_tokens: int
    """Loss-carrying tokens that the mean is over."""
    part: str = "eval"
    """``eval``, or ``test`` for the rows of ``--test-data-path``."""

    def metrics(self) -> dict[str, Any]:
        """The line of ``metrics.jsonl``."""
        return {
            "iteration": int(self.iteration),
            f"{self.part}_loss": _number(self.eval_loss),
            f"{self.part}_tokens": int(self.eval_tokens),
        }


def _number(value: float) -> float | None:
    """A number of full precision; JSON has no word for infinities and NaN, they become null."""
    value = float(value)
    return value if math.isfinite(value) else None
