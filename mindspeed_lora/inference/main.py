"""``inference.py``: plan, join, build, answer."""

from __future__ import annotations

from pathlib import Path

from mindspeed_lora.config.config_file import CONFIG_FILE
from mindspeed_lora.config.jobs import InferenceJob
from mindspeed_lora.inference.answers import answer_prompts, output_file
from mindspeed_lora.inference.chat import chat
from mindspeed_lora.inference.command import keep_config, run_command, say_notices
from mindspeed_lora.inference.dry_run import dry_run
from mindspeed_lora.inference.plan import CHAT, InferencePlan, plan_inference
from mindspeed_lora.inference.session import READING, InferenceSession
from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.parallel.heartbeat import Heartbeat


def infer(job: InferenceJob) -> int:
    """Runs the tasks of the job in order; see :func:`mindspeed_lora.inference.command.run_command`."""
    return run_command(job, dry_run, plan_inference, _run)


def _run(plan: InferencePlan, groups: ParallelGroups, notices: list[str], heartbeat: Heartbeat) -> None:
    heartbeat.mark(READING)
    session = InferenceSession(plan, groups)
    if groups.is_main:
        say_notices((*plan.notices, *notices, *session.notices))
        if plan.job.inference.output_file is not None:
            file = config_file(Path(plan.job.inference.output_file))
            keep_config(file, plan.job, "inference.py", groups.world_size)
    with output_file(session) as output:
        for task in plan.job.inference.task:
            heartbeat.mark(f"--task {task}")
            if task == CHAT:
                chat(session)
            else:
                answer_prompts(session, task, output)


def config_file(output: Path) -> Path:
    """Where the configuration of answers is kept: beside them, under their name, as a folder may hold several."""
    return output.with_name(f"{output.stem}.{CONFIG_FILE}")
