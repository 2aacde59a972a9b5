"""Tasks of lm-evaluation-harness (the package ``lm_eval``, which is optional), asked of our model."""

from __future__ import annotations

import difflib
import importlib.util
import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_lora.atomic import atomic_file
from mindspeed_lora.config.evaluation import BENCHMARKS
from mindspeed_lora.errors import Failed, Refused
from mindspeed_lora.evaluation.engine import Engine
from mindspeed_lora.evaluation.records import Record

if TYPE_CHECKING:
    from mindspeed_lora.evaluation.plan import EvaluationPlan

_RIGHT_OR_WRONG = ("acc", "exact_match", "pass@1", "em")
"""Metrics by which a question is right or wrong, the first that a task has counts."""


@dataclass(frozen=True)
class HarnessPlan:
    """A task, a group or a pattern of task names."""

    name: str
    include_path: Path | None
    """A folder with task files of the user's."""


def plan_harness(name: str, include_path: Path | None) -> HarnessPlan:
    """Checks that the task is known.

    Raises:
        Refused: lm_eval is not installed, or knows no such task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        near = difflib.get_close_matches(name, BENCHMARKS, n=3, cutoff=0.6)
        guess = f"did you mean {' or '.join(near)}? " if near else ""
        raise Refused(
            f"--task {name}: is none of {', '.join(BENCHMARKS)}; {guess}Other tasks are those of "
            "lm-evaluation-harness, which is not installed: pip install 'mindspeed_lora[eval]'"
        )
    if include_path is not None and not include_path.is_dir():
        raise Refused(f"--task-data-path {include_path}: is no folder; name that of the task's YAML files")
    plan = HarnessPlan(name, include_path)
    manager = _task_manager(plan)
    if not manager.match_tasks([name]):
        near = difflib.get_close_matches(name, [*BENCHMARKS, *manager.all_tasks], n=3, cutoff=0.6)
        raise Refused(
            f"--task {name}: neither built in nor known to lm_eval"
            + (f"; did you mean {' or '.join(near)}?" if near else f"; built in are {', '.join(BENCHMARKS)}")
        )
    return plan


def run_harness(engine: Engine, plan: EvaluationPlan, task: HarnessPlan) -> list[Record]:
    """Runs a task on rank 0; its own results are printed, and written as ``lm_eval.json``.

    Raises:
        Failed: lm_eval could not do it.
    """
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    from mindspeed_lora.evaluation.harness_model import HarnessModel

    evaluation, manager = plan.evaluation, _task_manager(task)
    # What it prints on the way is talk; the table is ours to print.
    with redirect_stdout(sys.stderr):
        found = simple_evaluate(
            model=HarnessModel(engine, plan),
            tasks=manager.match_tasks([task.name]),
            num_fewshot=evaluation.num_fewshot,
            limit=evaluation.max_eval_samples,
            task_manager=manager,
            apply_chat_template=not plan.encoder.is_raw,
            fewshot_as_multiturn=not plan.encoder.is_raw and evaluation.fewshot_as_multiturn == "true",
            bootstrap_iters=0,
            log_samples=True,
            confirm_run_unsafe_code=evaluation.allow_code_execution,
        )
    if found is None:
        raise Failed(f"--task {task.name}: lm_eval gave no results")
    print(make_table(found), flush=True)
    folder = plan.folder(task.name)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        told = {key: found[key] for key in ("results", "groups", "n-samples", "versions") if key in found}
        with atomic_file(folder / "lm_eval.json") as path:
            path.write_text(json.dumps(told, indent=2, default=str) + "\n", encoding="utf-8")
    return [
        _record(name, sample)
        for name, samples in found["samples"].items()
        for sample in samples
        if sample["filter"] == samples[0]["filter"]
    ]


def _task_manager(plan: HarnessPlan) -> Any:
    """The tasks that lm_eval knows; those of the user's folder alone where the task is one of them."""
    from lm_eval.tasks import TaskManager

    if plan.include_path is not None:
        own = TaskManager(include_path=str(plan.include_path), include_defaults=False)
        if own.match_tasks([plan.name]):
            return own
    return TaskManager(include_path=None if plan.include_path is None else str(plan.include_path))


def _record(task: str, sample: dict[str, Any]) -> Record:
    """One of lm_eval's samples as a record."""
    arguments, responses = sample["arguments"], sample["filtered_resps"]
    metric = next((name for name in _RIGHT_OR_WRONG if name in sample), None)
    value = None if metric is None else sample[metric]
    compared = all(isinstance(response, (tuple, list)) and len(response) == 2 for response in responses)
    choices = [str(one[1]) for one in arguments] if compared else []
    likelihoods = [float(response[0]) for response in responses] if compared else []
    prediction, answer = None, str(sample["target"])
    if compared:
        prediction = choices[likelihoods.index(max(likelihoods))]
        if isinstance(sample["target"], int) and sample["target"] < len(choices):
            answer = choices[sample["target"]]
    elif isinstance(responses[0], str):
        prediction = responses[0]
    return Record(
        subject=task,
        index=int(sample["doc_id"]),
        prompt=str(arguments[0][0]),
        choices=choices,
        loglikelihoods=likelihoods,
        prediction=prediction,
        answer=answer,
        correct=bool(value) if value in (0, 1) else None,
    )
