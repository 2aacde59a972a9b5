"""What ``inference.py`` and ``evaluation.py`` have in common: plan, join, work, leave; and what both write and say."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from mindspeed_lora.config.config_file import CONFIG_FILE, write_config
from mindspeed_lora.config.jobs import ModelJob
from mindspeed_lora.device.heap import share_one_arena
from mindspeed_lora.inference.model_plan import ModelPlan
from mindspeed_lora.parallel.groups import ParallelGroups, destroy_groups, initialize_groups
from mindspeed_lora.parallel.heartbeat import Heartbeat, for_answers
from mindspeed_lora.parallel.voice import speak_or_leave

AnyJob = TypeVar("AnyJob", bound=ModelJob)
AnyPlan = TypeVar("AnyPlan", bound=ModelPlan)


def run_command(
    job: AnyJob,
    dry_run: Callable[[AnyJob], None],
    plan_job: Callable[[AnyJob], AnyPlan],
    work: Callable[[AnyPlan, ParallelGroups, list[str], Heartbeat], None],
) -> int:
    """Does what a job asks, on every rank; returns 0.

    Args:
        job: checked and resolved.
        dry_run: what is done in place of it with ``--dry-run``.
        plan_job: resolves the job without peers.
        work: is given the plan, the ranks, notices for the user, and where to mark what begins.

    Raises:
        Refused: the job cannot be, found before any process group is made.
        Failed: the work could not be done.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal may lack a character of an answer or a name.
        sys.stdout.reconfigure(errors="replace")
    if job.runtime.dry_run:
        dry_run(job)
        return 0
    plan = plan_job(job)
    share_one_arena()
    groups, notices = initialize_groups(plan.job.parallel, job.compute.seed)
    with for_answers(groups) as heartbeat:
        try:
            work(plan, groups, notices, heartbeat)
        except Exception as error:
            raise speak_or_leave(error, groups, heartbeat) from error
    destroy_groups()
    return 0


def say_notices(texts: Iterable[str]) -> None:
    """Tells the user on standard error."""
    for text in texts:
        print(f"notice: {text}", file=sys.stderr, flush=True)


def keep_config(file: Path, job: ModelJob, script: str, world_size: int) -> None:
    """Writes the job's configuration; what another command wrote under that name stays, and this one goes beside it."""
    if file.is_file() and not file.read_text(encoding="utf-8", errors="replace").startswith(f"# {script}"):
        file = file.with_name(f"{script.removesuffix('.py')}.{CONFIG_FILE}")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_config(file, job, script, world_size)
