"""A training run that a program drives: step by step, or to its end."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch

from mindspeed_lora.config.jobs import TrainJob
from mindspeed_lora.device.limits import free_memory_bytes
from mindspeed_lora.errors import Refused
from mindspeed_lora.parallel.joining import joined_groups
from mindspeed_lora.training.loop import TrainingLoop
from mindspeed_lora.training.main import opened_loop, plan_run
from mindspeed_lora.training.out_of_memory import memory_errors_told
from mindspeed_lora.training.reporting import EvaluationRecord, Reporter, StepRecord
from mindspeed_lora.training.signals import LEFT_EARLY, StopRequest


@dataclass
class History:
    """What a run has told since it was opened, the same on every rank."""

    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """``lm_loss`` of each step."""
        return [record.lm_loss for record in self.steps]


class _SteppedLoop(TrainingLoop):
    """The loop, with its parts to be called one by one."""

    def one_step(self) -> None:
        """One optimizer step."""
        self._step()

    def evaluate_now(self) -> None:
        """The loss on the validation rows."""
        self._evaluate()

    def save_now(self) -> None:
        """A checkpoint of the last step, unless there is one."""
        self._save()


class _Recorder:
    """Keeps the records that the loop tells its reporter, and passes all on."""

    def __init__(self, reporter: Reporter, history: History) -> None:
        self._reporter = reporter
        self._history = history

    def step(self, record: StepRecord) -> None:
        self._history.steps.append(record)
        self._reporter.step(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        self._history.evaluations.append(record)
        self._reporter.evaluation(record)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reporter, name)


class Trainer:
    """A model with its adapter, its rows and its optimizer, loaded and ready; :func:`mindspeed_lora.trainer` opens it.

    Every rank makes the same calls. To be used in a ``with`` statement, or closed with :meth:`close`. SIGTERM and
    SIGUSR1 are listened to meanwhile, so it is opened in the main thread.
    """

    def __init__(self, job: TrainJob) -> None:
        """Plans, joins, loads.

        Raises:
            Refused: the job cannot be, found before anything is loaded.
            Failed: the work could not be done.
        """
        self.history = History()
        self.left_early = False
        """Whether :meth:`train` saved and left because of a signal or a time limit."""
        with ExitStack() as stack:
            plan = plan_run(job)
            stop = stack.enter_context(StopRequest(job.training.exit_duration_in_mins))
            joined = stack.enter_context(joined_groups(job.parallel, job.training.seed))
            groups, notices, heartbeat = joined
            self._told = partial(memory_errors_told, plan, groups, heartbeat, free_memory_bytes())
            told = [*job.notices, *notices]
            with self._told():
                self._loop = stack.enter_context(
                    opened_loop(_SteppedLoop, plan, groups, stop, heartbeat, told)
                )
            self._loop.reporter = cast(Reporter, _Recorder(self._loop.reporter, self.history))
            self._open = stack.pop_all()
            self._closed = False

    @property
    def job(self) -> TrainJob:
        """The configuration, with every default filled in."""
        return self._loop.plan.job

    @property
    def is_main(self) -> bool:
        """True on rank 0, which prints and writes for all."""
        return self._loop.session.groups.is_main

    @property
    def modules(self) -> list[torch.nn.Module]:
        """This rank's chunks of the model, the adapter in place: one, or several with virtual pipeline stages."""
        return list(self._loop.session.chunks)

    @property
    def trained(self) -> Mapping[str, torch.nn.Parameter]:
        """This rank's parts of what is trained, by the names in the unsharded model."""
        return {parameter.name: parameter.param for parameter in self._loop.session.trained}

    @property
    def iteration(self) -> int:
        """Optimizer steps that are done, those of earlier runs that this one goes on from included."""
        return self._loop.progress.iteration

    @property
    def num_steps(self) -> int:
        """Steps of the whole run, to which the learning rate's schedule belongs."""
        return self._loop.plan.num_steps

    def step(self) -> StepRecord:
        """One optimizer step.

        Raises:
            Refused: the last one is done.
            Failed: out of memory; the sentence names what grew and a flag that fits.
        """
        if self.iteration >= self.num_steps and not self._closed:
            raise Refused(
                f"all {self.num_steps} steps are done; open the trainer with more train_iters, or with epochs"
            )
        with self._working():
            self._loop.one_step()
        return self.history.steps[-1]

    def evaluate(self) -> EvaluationRecord:
        """The loss on the validation rows.

        Raises:
            Refused: the job has none.
        """
        if self._loop.session.evaluation is None:
            raise Refused(
                "there are no rows to evaluate on; give eval_iters, and split='95,5,0' or valid_data_path"
            )
        with self._working():
            self._loop.evaluate_now()
        return self.history.evaluations[-1]

    def train(self, steps: int | None = None) -> History:
        """So many steps, or all that are left as the command does it: with its evaluations and saves."""
        if steps is None:
            with self._working():
                self.left_early = self._loop.run() == LEFT_EARLY
        else:
            for _ in range(steps):
                self.step()
        return self.history

    def save(self) -> Path:
        """Writes a checkpoint of the last step; returns the folder of the adapter, else of the run.

        Raises:
            Refused: the trainer was opened without ``save``.
        """
        if self.job.checkpoint.save is None:
            raise Refused(
                "the trainer was opened without save; name the folder there: trainer(save='ckpt/run', …)"
            )
        with self._working():
            self._loop.save_now()
        save = Path(self.job.checkpoint.save)
        return save if self._loop.plan.adapter is None else save / "adapter"

    def close(self) -> None:
        """Gives the groups back and ends the reports; harmless when closed."""
        self._closed = True
        self._open.close()

    def _working(self) -> AbstractContextManager[None]:
        """Out of memory is told; what is closed works no more."""
        if self._closed:
            raise Refused(
                "the trainer is closed; open another one, which goes on from save with resume='auto'"
            )
        return self._told()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        self._open.__exit__(kind, error, trace)
