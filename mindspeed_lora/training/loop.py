"""The loop over optimizer steps: train, report, evaluate, save, stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.data.batch import Batch
from mindspeed_lora.device import peak_memory_bytes, synchronize
from mindspeed_lora.errors import Failed
from mindspeed_lora.parallel.collectives import all_reduce_max, together
from mindspeed_lora.parallel.heartbeat import Heartbeat
from mindspeed_lora.training.finite import broken_weight
from mindspeed_lora.training.garbage import garbage_collection
from mindspeed_lora.training.grace import SaveGrace, estimate_save_seconds
from mindspeed_lora.training.reporting import EvaluationRecord, Reporter, StepRecord
from mindspeed_lora.training.session import TrainingSession
from mindspeed_lora.training.signals import LEFT_EARLY, StopReason, StopRequest


@dataclass
class Progress:
    """What changes from step to step and is saved with a checkpoint."""

    iteration: int = 0
    best_eval_loss: float = math.inf
    evaluations_without_gain: int = 0
    evaluated_at: int | None = field(default=None)
    saved_at: int | None = field(default=None)


class TrainingLoop:
    """Runs a session to its end; the same on every rank."""

    def __init__(
        self,
        session: TrainingSession,
        reporter: Reporter,
        stop: StopRequest,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.session = session
        self._mark = heartbeat.mark if heartbeat is not None else _nowhere
        self.plan = session.plan
        self.training = session.plan.job.training
        self.checkpoint = session.plan.job.checkpoint
        self.reporter = reporter
        self.stop = stop
        self._collect_garbage: Callable[[int], None] = lambda step: None
        state = session.restored_state
        self.progress = Progress(iteration=session.plan.start.iteration)
        if session.plan.start.continues:
            self.progress.best_eval_loss = state.get("best_eval_loss") or math.inf
            self.progress.evaluations_without_gain = state.get("evaluations_without_gain", 0)
            self.progress.evaluated_at = state.get("evaluated_at")
        if self.checkpoint.save and session.plan.start.goes_on_in(Path(self.checkpoint.save)):
            self.progress.saved_at = self.progress.iteration
        self._grace = self._watch_grace()

    def run(self) -> int:
        """Trains until the last step, a signal, a limit or early stopping; returns the exit status."""
        with garbage_collection(self.training) as self._collect_garbage:
            return self._run()

    def _run(self) -> int:
        progress = self.progress
        self._evaluate_if_due()
        while progress.iteration < self.plan.num_steps:
            stop_reason = self._step()
            # Whoever sent the signal may not wait: an evaluation that is due is the first thing after resuming.
            why = stop_reason.describe() if stop_reason else self._exit_interval()
            if why:
                what = (
                    "saving and leaving"
                    if self.checkpoint.save
                    else "leaving without --save, so nothing is kept,"
                )
                self.reporter.notice(f"{why}: {what} after iteration {progress.iteration}")
                self._save()
                # --exit-interval is a length that was asked for.
                return LEFT_EARLY if stop_reason else 0
            self._evaluate_if_due()
            interval = self.checkpoint.save_interval
            if interval is not None and progress.iteration % interval == 0:
                self._save()
            if self._out_of_patience():
                break
        if self._evaluates() and progress.evaluated_at != progress.iteration:
            self._evaluate()
        self._save()
        self._test()
        return 0

    def _step(self) -> StopReason:
        """One optimizer step; returns why to stop after it, where a reason came up on any rank."""
        session, progress = self.session, self.progress
        step = progress.iteration + 1
        synchronize()
        started = time.perf_counter()
        self._mark("forward and backward passes", step)
        session.optimizer.zero_grad()
        loss = session.runner.train(session.batches.step(step), step)
        lr = self.plan.learning_rate.at(step - 1)
        scale = session.optimizer.loss_scale.scale
        grad_norm, skipped = 0.0, True
        if loss.loss_tokens == 0:
            self.reporter.notice(
                f"iteration {step}: no row of the global batch carries loss; nothing is updated"
            )
        else:
            self._mark("optimizer")
            outcome = session.optimizer.step(lr)
            grad_norm, skipped = outcome.grad_norm, outcome.skipped
            self._check_finite(step, loss.lm_loss, skipped)
        synchronize()
        elapsed = time.perf_counter() - started
        progress.iteration = step
        self._collect_garbage(step)
        peak, stop_reason = self._agree()
        self.reporter.step(
            StepRecord(
                iteration=step,
                consumed_samples=step * self.training.global_batch_size,
                lm_loss=loss.lm_loss,
                grad_norm=grad_norm,
                learning_rate=lr,
                tokens=loss.tokens,
                loss_tokens=loss.loss_tokens,
                elapsed_ms=elapsed * 1000,
                peak_memory_bytes=peak,
                loss_scale=scale,
                skipped=skipped,
                router_losses=loss.router_losses,
            )
        )
        self._tell(self._grace.after_step(elapsed) if self._grace is not None else None)
        return stop_reason

    def _watch_grace(self) -> SaveGrace | None:
        """On the rank that speaks, where there is something to save."""
        groups, save = self.session.groups, self.checkpoint.save
        if not groups.is_main or self.session.writer is None or save is None:
            return None
        size = self.session.writer.estimated_bytes(sum(p.num_trained for p in self.session.trained))
        return SaveGrace(self.checkpoint.sigterm_grace_seconds, estimate_save_seconds(Path(save), size))

    def _tell(self, text: str | None) -> None:
        if text is not None:
            self.reporter.notice(text)

    def _exit_interval(self) -> str:
        """Why to leave after the step that is done, where ``--exit-interval`` says so and it is not the last one."""
        interval, iteration = self.training.exit_interval, self.progress.iteration
        if interval is None or iteration % interval or iteration >= self.plan.num_steps:
            return ""
        return f"--exit-interval {interval} is reached"

    def _check_finite(self, step: int, lm_loss: float, skipped: bool) -> None:
        """Outside of float16 a loss or gradient that is not finite cannot be mended by a smaller loss scale."""
        if self.training.fp16 and self.session.optimizer.loss_scale.dynamic:
            return
        if not skipped and math.isfinite(lm_loss):
            return
        if self.training.no_check_for_nan_in_loss_and_grad:
            self.reporter.notice(
                f"iteration {step}: the loss or a gradient is not finite{'; nothing is updated' if skipped else ''}"
            )
        else:
            together(self.session.groups, lambda: self._refuse_to_go_on(step, lm_loss, skipped))

    def _refuse_to_go_on(self, step: int, lm_loss: float, skipped: bool) -> None:
        weight = broken_weight(self.session.parameters, self.session.groups)
        of_base = f"{weight} of the model holds NaN or infinite values, take weights without them"
        raise Failed(
            f"iteration {step}: the loss is {lm_loss:g} and the gradient norm is "
            f"{'not finite' if skipped else 'finite'}; "
            f"{of_base if weight else 'lower --lr, or look at the rows of this step'}; "
            f"nothing was updated in it, and the last checkpoint is whole"
        )

    def _agree(self) -> tuple[int, StopReason]:
        """Largest peak memory over the ranks, and the most urgent reason of any of them to stop."""
        mine = [float(peak_memory_bytes()), float(self.stop.requested())]
        values = all_reduce_max(torch.tensor(mine, dtype=torch.float64), self.session.groups.control_group)
        return int(values[0]), StopReason(int(values[1]))

    def _evaluates(self) -> bool:
        return self.session.evaluation is not None

    def _evaluate_if_due(self) -> None:
        iteration = self.progress.iteration
        due = iteration % self.training.eval_interval == 0 and self.progress.evaluated_at != iteration
        if due and self._evaluates():
            self._evaluate()

    def _evaluate(self) -> None:
        """Loss on the evaluation rows; keeps the best checkpoint where that is asked for."""
        session, progress = self.session, self.progress
        assert session.evaluation is not None
        eval_loss, tokens = self._mean_loss(session.evaluation)
        self.reporter.evaluation(EvaluationRecord(progress.iteration, eval_loss, tokens))
        progress.evaluated_at = progress.iteration
        if eval_loss < progress.best_eval_loss:
            progress.best_eval_loss = eval_loss
            progress.evaluations_without_gain = 0
            if self.checkpoint.save_best and session.writer is not None and progress.iteration > 0:
                session.writer.write_best(self._state())
        else:
            progress.evaluations_without_gain += 1

    def _test(self) -> None:
        """Loss on the test rows, at the end."""
        if self.session.test is not None:
            loss, tokens = self._mean_loss(self.session.test)
            self.reporter.evaluation(EvaluationRecord(self.progress.iteration, loss, tokens, "test"))

    def _mean_loss(self, rows: Iterable[list[Batch]]) -> tuple[float, int]:
        """Mean over all loss-carrying tokens of the rows, each with its weight, and their number."""
        total, weight, tokens = 0.0, 0.0, 0
        for batches in rows:
            self._mark("evaluation")
            loss = self.session.runner.evaluate(batches)
            total += loss.lm_loss * loss.loss_weight
            weight += loss.loss_weight
            tokens += loss.loss_tokens
        return total / (weight or 1.0), tokens

    def _out_of_patience(self) -> bool:
        patience = self.training.early_stopping_patience
        if patience is None or self.progress.evaluations_without_gain < patience:
            return False
        self.reporter.notice(
            f"the evaluation loss did not fall in {patience} evaluations: stopping after iteration "
            f"{self.progress.iteration}"
        )
        return True

    def _save(self) -> None:
        self.session.optimizer.finish_gather()
        writer = self.session.writer
        if writer is None or self.progress.saved_at == self.progress.iteration:
            return
        self._mark("saving")
        folder, seconds = writer.write(self._state())
        self.progress.saved_at = self.progress.iteration
        self.reporter.saved(folder, seconds)
        self._tell(self._grace.after_save(seconds) if self._grace is not None else None)

    def _state(self) -> dict[str, Any]:
        best = self.progress.best_eval_loss
        return {
            "iteration": self.progress.iteration,
            "best_eval_loss": best if math.isfinite(best) else None,
            "evaluations_without_gain": self.progress.evaluations_without_gain,
            "evaluated_at": self.progress.evaluated_at,
            **self.session.state(),
        }


def _nowhere(phase: str, step: int | None = None) -> None:
    """In the place of a heartbeat."""
