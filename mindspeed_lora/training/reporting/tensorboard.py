"""Tensorboard events under the names that Megatron gives them.

A logger must never stop a run: the first error switches it off, with one notice.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindspeed_lora.training.reporting.iteration_line import perplexity
from mindspeed_lora.training.reporting.records import EvaluationRecord, StepRecord


def tensorboard_installed() -> bool:
    """Whether the package is there; nothing is imported."""
    return importlib.util.find_spec("tensorboard") is not None


class TensorboardEvents:
    """Event files in ``folder``, beginning after iteration ``resumed_iteration``."""

    def __init__(
        self, folder: Path, resumed_iteration: int, global_batch_size: int, notice: Callable[[str], None]
    ) -> None:
        """``notice`` is called with one sentence when events can no longer be written."""
        self._notice = notice
        self._global_batch_size = global_batch_size
        self._consumed_samples = resumed_iteration * global_batch_size
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            # Events of steps that an earlier process did and this one does again are hidden; a fresh run
            # hides all of the folder's.
            purge = resumed_iteration + 1 if resumed_iteration > 0 else 0
            self._writer = SummaryWriter(str(folder), purge_step=purge)
        except Exception as error:
            self._switch_off(error)

    def step(self, record: StepRecord) -> None:
        """Write the scalars of a step."""
        self._consumed_samples = record.consumed_samples
        loss = {} if record.skipped else {"lm loss": record.lm_loss}
        by_both = {"learning-rate": record.learning_rate, "grad-norm": record.grad_norm, **loss}
        by_iteration = {
            "batch-size": self._global_batch_size,
            "loss-scale": record.loss_scale,
            "iteration-time": record.elapsed_ms / 1000.0,
            "tokens-per-second": record.tokens_per_second,
            "mem-max-allocated-bytes": record.peak_memory_bytes,
        }
        self._write(by_both, by_iteration, record.iteration)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Write the scalars of an evaluation."""
        loss = record.eval_loss
        by_both = {"lm loss validation": loss, "lm loss validation ppl": perplexity(loss)}
        self._write(by_both, {}, record.iteration)

    def flush(self) -> None:
        """Bring the events to the disk."""
        self._guarded(lambda writer: writer.flush())

    def close(self) -> None:
        """Bring the events to the disk and close the file."""
        self._guarded(lambda writer: writer.close())
        self._writer = None

    def _write(self, by_both: dict[str, float], by_iteration: dict[str, float], iteration: int) -> None:
        """Write scalars over the iteration, and the first ones over the consumed samples too."""

        def add(writer: Any) -> None:
            for tag, value in {**by_both, **by_iteration}.items():
                writer.add_scalar(tag, value, iteration)
            for tag, value in by_both.items():
                writer.add_scalar(f"{tag} vs samples", value, self._consumed_samples)

        self._guarded(add)

    def _guarded(self, action: Callable[[Any], None]) -> None:
        if self._writer is None:
            return
        try:
            action(self._writer)
        except Exception as error:
            self._switch_off(error)

    def _switch_off(self, error: Exception) -> None:
        self._writer = None
        reason = " ".join(str(error).split()) or type(error).__name__
        self._notice(f"no more tensorboard events are written: {reason}")
