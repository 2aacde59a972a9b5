"""``posttrain_gpt.py`` and ``pretrain_gpt.py``: plan, join, build, train."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from mindspeed_lora.config.jobs import TrainJob
from mindspeed_lora.device import compute_dtype, has_accelerator
from mindspeed_lora.parallel.collectives import together
from mindspeed_lora.parallel.groups import ParallelGroups, destroy_groups, initialize_groups
from mindspeed_lora.parallel.voice import speak_or_leave
from mindspeed_lora.training.loop import TrainingLoop
from mindspeed_lora.training.plan import TrainPlan, plan_training
from mindspeed_lora.training.reporting import ModelFlops, Reporter, layout_lines, layout_rows
from mindspeed_lora.training.run_folder import clear_run
from mindspeed_lora.training.session import TrainingSession
from mindspeed_lora.training.signals import StopRequest


def train(job: TrainJob) -> int:
    """Trains as the job says; returns 0 when done, 75 when saved and left early.

    Raises:
        Refused: the job cannot be, found before any process group is made.
        Failed: the work could not be done.
    """
    started = time.monotonic()
    plan = plan_training(job)
    if job.runtime.dry_run:
        _tell_plan(plan)
        return 0
    with StopRequest(job.training.exit_duration_in_mins, started) as stop:
        groups, notices = initialize_groups(job.parallel, job.training.seed)
        try:
            status = _train(plan, groups, stop, notices)
        except Exception as error:
            raise speak_or_leave(error, groups) from error
        destroy_groups()
        return status


def _train(plan: TrainPlan, groups: ParallelGroups, stop: StopRequest, notices: list[str]) -> int:
    job = plan.job
    save = Path(job.checkpoint.save) if job.checkpoint.save else None
    session = TrainingSession(plan, groups)
    if save is not None and job.checkpoint.overwrite and not plan.start.goes_on_in(save):
        together(groups, lambda: clear_run(save) if groups.is_main else None)
    with together(groups, lambda: _reporter(session, save)) as reporter:
        for text in (*plan.notices, *notices, *session.notices):
            reporter.notice(text)
        _describe(session, reporter)
        status = TrainingLoop(session, reporter, stop).run()
        reporter.finish()
    return status


def _reporter(session: TrainingSession, save: Path | None) -> Reporter:
    plan, groups = session.plan, session.groups
    if not groups.is_main:
        return Reporter.silent()
    return Reporter(
        logging=plan.job.logging,
        save=save,
        total_steps=plan.num_steps,
        global_batch_size=plan.job.training.global_batch_size,
        resumed_iteration=plan.start.iteration,
        world_size=groups.world_size,
        model_flops=ModelFlops.of(plan.shape, plan.adapter.spec if plan.adapter is not None else None),
    )


def _tell_plan(plan: TrainPlan) -> None:
    """What ``--dry-run`` prints: the table of the layout, without parameter counts."""
    if os.environ.get("RANK", "0") != "0":
        return
    world_size = plan.job.runtime.resolve_world_size(plan.job.parallel, os.environ)
    dtype, notice = compute_dtype(plan.job.training.bf16, plan.job.training.fp16)
    for text in (*plan.notices, *([notice] if notice else [])):
        print(f"notice: {text}", file=sys.stderr)
    print("\n".join(layout_lines(_layout(plan, world_size, dtype), None)))
    print("dry run: everything checked, nothing written")


def _describe(session: TrainingSession, reporter: Reporter) -> None:
    """The layout and the number of parameters."""
    rows = _layout(session.plan, session.groups.world_size, session.dtype)
    reporter.layout(rows, session.parameter_counts())


def _layout(plan: TrainPlan, world_size: int, dtype: torch.dtype) -> list[tuple[str, str]]:
    job, device = plan.job, "cuda" if has_accelerator() else "cpu"
    rows = layout_rows(job.parallel, job.training, world_size, device, str(dtype).removeprefix("torch."))
    rows += [
        ("model", f"{plan.shape.family}, {plan.shape.num_layers} layers, hidden {plan.shape.hidden_size}"),
        ("weights", str(plan.source.path)),
        ("rows", f"{len(plan.rows.train)}, of at most {plan.seq_length} tokens"),
        ("steps", str(plan.num_steps)),
    ]
    if job.parallel.pipeline_model_parallel_size > 1 or plan.placement.noop_slots:
        rows.append(("layers by stage", plan.placement.describe()))
    if plan.adapter is not None:
        rows.append(("adapter", plan.adapter.spec.describe()))
    return rows
