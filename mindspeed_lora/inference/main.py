"""``inference.py``: plan, join, build, answer."""

from __future__ import annotations

import io
import sys

from mindspeed_lora.config.jobs import InferenceJob
from mindspeed_lora.inference.answers import answer_prompts, output_file
from mindspeed_lora.inference.chat import chat
from mindspeed_lora.inference.dry_run import dry_run
from mindspeed_lora.inference.plan import CHAT, InferencePlan, plan_inference
from mindspeed_lora.inference.session import InferenceSession
from mindspeed_lora.parallel.groups import ParallelGroups, destroy_groups, initialize_groups
from mindspeed_lora.parallel.voice import speak_or_leave


def infer(job: InferenceJob) -> int:
    """Runs the tasks of the job in order; returns 0.

    Raises:
        Refused: the job cannot be, found before any process group is made.
        Failed: the work could not be done.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal may lack a character of the answer.
        sys.stdout.reconfigure(errors="replace")
    if job.runtime.dry_run:
        dry_run(job)
        return 0
    plan = plan_inference(job)
    groups, notices = initialize_groups(job.parallel, job.inference.seed)
    try:
        _run(plan, groups, notices)
    except Exception as error:
        raise speak_or_leave(error, groups) from error
    destroy_groups()
    return 0


def _run(plan: InferencePlan, groups: ParallelGroups, notices: list[str]) -> None:
    session = InferenceSession(plan, groups)
    if groups.is_main:
        for text in (*plan.notices, *notices, *session.notices):
            print(f"notice: {text}", file=sys.stderr, flush=True)
    with output_file(session) as output:
        for task in plan.job.inference.task:
            if task == CHAT:
                chat(session)
            else:
                answer_prompts(session, task, output)
