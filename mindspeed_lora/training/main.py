"""``posttrain_gpt.py`` and ``pretrain_gpt.py``: plan, join, build, train."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import yaml

from mindspeed_lora.config.config_file import CONFIG_FILE, to_yaml, write_config
from mindspeed_lora.config.jobs import TrainJob
from mindspeed_lora.device.limits import free_memory_bytes
from mindspeed_lora.parallel.collectives import together
from mindspeed_lora.parallel.groups import ParallelGroups, destroy_groups, initialize_groups
from mindspeed_lora.parallel.heartbeat import Heartbeat
from mindspeed_lora.parallel.voice import speak_or_leave
from mindspeed_lora.training.description import plan_rows
from mindspeed_lora.training.dry_run import dry_run
from mindspeed_lora.training.loop import TrainingLoop
from mindspeed_lora.training.out_of_memory import memory_errors_told
from mindspeed_lora.training.plan import TrainPlan, plan_training
from mindspeed_lora.training.reporting import ModelFlops, Reporter
from mindspeed_lora.training.reporting.trackers import check_trackers
from mindspeed_lora.training.run_folder import announce_replacement, clear_run
from mindspeed_lora.training.session import TrainingSession
from mindspeed_lora.training.signals import StopRequest

Loop = TypeVar("Loop", bound=TrainingLoop)


def train(job: TrainJob) -> int:
    """Trains as the job says; returns 0 when done, 75 when saved and left early.

    Raises:
        Refused: the job cannot be, found before any process group is made.
        Failed: the work could not be done.
    """
    started = time.monotonic()
    if job.runtime.dry_run:
        dry_run(job)
        return 0
    plan = plan_run(job)
    with StopRequest(job.training.exit_duration_in_mins, started) as stop:
        groups, notices = initialize_groups(job.parallel, job.training.seed)
        free = free_memory_bytes()
        with Heartbeat(groups) as heartbeat:
            try:
                with memory_errors_told(plan, groups, heartbeat, free):
                    status = _train(plan, groups, stop, heartbeat, notices)
            except Exception as error:
                raise speak_or_leave(error, groups, heartbeat) from error
        destroy_groups()
        return status


def plan_run(job: TrainJob) -> TrainPlan:
    """The plan of a run that is about to start; what it replaces is noted before anything is loaded.

    Raises:
        Refused: the job cannot be.
    """
    check_trackers(job.logging)
    plan = plan_training(job)
    if (
        _replaces(plan)
        and job.checkpoint.save is not None
        and os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"
    ):
        announce_replacement(Path(job.checkpoint.save))
    return plan


def _train(
    plan: TrainPlan, groups: ParallelGroups, stop: StopRequest, heartbeat: Heartbeat, notices: list[str]
) -> int:
    with opened_loop(TrainingLoop, plan, groups, stop, heartbeat, notices) as loop:
        return loop.run()


@contextmanager
def opened_loop(
    kind: type[Loop],
    plan: TrainPlan,
    groups: ParallelGroups,
    stop: StopRequest,
    heartbeat: Heartbeat,
    notices: list[str],
) -> Iterator[Loop]:
    """The loop of a plan with all that it drives, reported on; an end without an error ends the reports."""
    job = plan.job
    heartbeat.mark("building the model and reading its weights")
    save = Path(job.checkpoint.save) if job.checkpoint.save else None
    session = TrainingSession(plan, groups)
    if save is not None and session.writer is not None and _replaces(plan):
        leads = session.writer.storage.leads
        together(groups, lambda: clear_run(save) if leads else None)
    with together(groups, lambda: _reporter(session, save)) as reporter:
        for text in (*plan.notices, *notices, *session.notices):
            reporter.notice(text)
        _describe(session, reporter)
        yield kind(session, reporter, stop, heartbeat)
        reporter.finish()


def _replaces(plan: TrainPlan) -> bool:
    """Whether what ``--save`` holds gives way to this run."""
    checkpoint = plan.job.checkpoint
    return checkpoint.overwrite and not (checkpoint.save and plan.start.goes_on_in(Path(checkpoint.save)))


def _reporter(session: TrainingSession, save: Path | None) -> Reporter:
    plan, groups = session.plan, session.groups
    if not groups.is_main:
        return Reporter.silent()
    if save is not None:
        script = "pretrain_gpt.py" if plan.job.training.stage == "pretrain" else "posttrain_gpt.py"
        write_config(save / CONFIG_FILE, plan.job, script, groups.world_size)
    return Reporter(
        logging=plan.job.logging,
        save=save,
        total_steps=plan.num_steps,
        global_batch_size=plan.job.training.global_batch_size,
        resumed_iteration=plan.start.iteration,
        world_size=groups.world_size,
        config=yaml.safe_load(to_yaml(plan.job)),
        model_flops=ModelFlops.of(plan.shape, plan.adapter.spec if plan.adapter is not None else None),
    )


def _describe(session: TrainingSession, reporter: Reporter) -> None:
    """The layout and the number of parameters."""
    rows = plan_rows(session.plan, session.groups.world_size, session.dtype)
    reporter.layout(rows, session.parameter_counts())
