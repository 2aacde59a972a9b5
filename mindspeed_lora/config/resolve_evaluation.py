"""The rules that span several flags of ``evaluation.py``."""

from __future__ import annotations

from collections.abc import Mapping

from mindspeed_lora.config.evaluation import BENCHMARKS
from mindspeed_lora.config.jobs import EvaluationJob
from mindspeed_lora.config.resolve import resolve_model_job
from mindspeed_lora.errors import Refused


def resolve_evaluation(job: EvaluationJob, environ: Mapping[str, str]) -> EvaluationJob:
    """Check an evaluation job.

    Raises:
        Refused: there is no task, or flags contradict each other.
    """
    evaluation = job.evaluation
    if evaluation.no_chat_template and job.tokenizer.hf_chat_template:
        raise Refused("--no-chat-template and --hf-chat-template are both given; give one of them")
    if not job.runtime.print_config:
        if evaluation.task is None:
            raise Refused(
                f"--task is missing: name benchmarks, of {', '.join(BENCHMARKS)} or of lm-evaluation-harness"
            )
        _check_paths(evaluation.task, evaluation.task_data_path or ())
        twice = [task for task in evaluation.task if evaluation.task.count(task) > 1]
        if twice and evaluation.output_dir is not None:
            raise Refused(
                f"--task names {twice[0]} twice, whose results would take each other's place in --output-dir "
                f"{evaluation.output_dir}; judge it once, or in two commands"
            )
        if not job.runtime.dry_run:
            _refuse_placeholders("--task", evaluation.task)
            _refuse_placeholders("--task-data-path", evaluation.task_data_path or ())
        if (
            "human_eval" in evaluation.task
            and not evaluation.allow_code_execution
            and not job.runtime.dry_run
        ):
            raise Refused(
                "--task human_eval runs programs that the model has written; give --allow-code-execution to allow that"
            )
    return resolve_model_job(job, environ)


def _check_paths(tasks: tuple[str, ...], paths: tuple[str, ...]) -> None:
    own = [task for task in tasks if task in BENCHMARKS]
    if own and not paths:
        raise Refused(f"--task-data-path is missing: name the folder of the questions of {own[0]}")
    if len(paths) not in (0, 1, len(tasks)):
        raise Refused(
            f"--task-data-path names {len(paths)} paths for {len(tasks)} tasks; give one for each, in their order"
        )
    if len(own) > 1 and len(paths) == 1:
        raise Refused(
            f"--task-data-path names 1 path for the {len(own)} benchmarks {', '.join(own)}; give one for each task"
        )


def is_placeholder(word: str) -> bool:
    """Whether it stands in a published script for what the user is to put there (``your task name``)."""
    return word.strip().lower().startswith("your ")


def _refuse_placeholders(name: str, words: tuple[str, ...]) -> None:
    for word in words:
        if is_placeholder(word):
            raise Refused(f"{name} is still the placeholder {word!r}; put a name of yours there")
