"""The learning rate of each step, by Megatron-LM's formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mindspeed_lora.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """Linear warm-up from 0, then decay from ``lr`` to ``min_lr``."""

    lr: float
    min_lr: float
    style: str
    """``cosine``, ``linear`` or ``constant``."""
    warmup_steps: float
    decay_steps: int

    @classmethod
    def of(cls, training: TrainingConfig, num_steps: int) -> LearningRate:
        """The schedule of a run of ``num_steps`` optimizer steps."""
        return cls(
            lr=training.lr,
            min_lr=training.min_lr,
            style=training.lr_decay_style,
            warmup_steps=training.warmup_steps(num_steps),
            decay_steps=training.decay_steps(num_steps),
        )

    def changes(self, before: Mapping[str, Any]) -> list[str]:
        """Where it differs from what a checkpoint kept of another one, as ``name before → now``."""
        return [
            f"{name.replace('_', ' ')} {before[name]} → {value}"
            for name, value in asdict(self).items()
            if name in before and before[name] != value
        ]

    def at(self, steps_done: int) -> float:
        """The rate of the step that follows ``steps_done`` finished ones (step k uses ``at(k − 1)``)."""
        if self.warmup_steps > 0 and steps_done <= self.warmup_steps:
            return self.lr * steps_done / self.warmup_steps
        if self.style == "constant":
            return self.lr
        if steps_done > self.decay_steps:
            return self.min_lr
        ratio = (steps_done - self.warmup_steps) / (self.decay_steps - self.warmup_steps)
        share = 1.0 - ratio if self.style == "linear" else 0.5 * (math.cos(math.pi * ratio) + 1.0)
        return self.min_lr + share * (self.lr - self.min_lr)
