"""``--dry-run``: model, layout and questions are checked and told, without weights and without peers."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mindspeed_lora.config.evaluation import EvaluationConfig
from mindspeed_lora.config.jobs import EvaluationJob
from mindspeed_lora.config.missing_inputs import without_missing_inputs
from mindspeed_lora.config.resolve_evaluation import is_placeholder
from mindspeed_lora.device import compute_dtype
from mindspeed_lora.evaluation.benchmark import Question
from mindspeed_lora.evaluation.encoding import QuestionEncoder
from mindspeed_lora.evaluation.harness import HarnessPlan
from mindspeed_lora.evaluation.heeded import without_effect
from mindspeed_lora.evaluation.plan import BenchmarkPlan, check_output_dir, named_tasks, plan_task
from mindspeed_lora.inference.dry_run import model_rows, predicted_rows
from mindspeed_lora.inference.memory import Work
from mindspeed_lora.inference.model_plan import plan_model, plan_tokenizer
from mindspeed_lora.inference.prompts import PromptEncoder
from mindspeed_lora.training.reporting import layout_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def dry_run(job: EvaluationJob, environ: Mapping[str, str] = os.environ) -> None:
    """Checks everything and prints, on rank 0, the layout, the model and what would be asked.

    Raises:
        Refused: the job cannot be.
    """
    job, missing = without_missing_inputs(job)
    plan = plan_model(job)
    evaluation = job.evaluation
    check_output_dir(evaluation)
    named = job.tokenizer.tokenizer_name_or_path or job.tokenizer.tokenizer_model
    tokenizer = None
    if named is not None or plan.source.config_dir is not None or not missing:
        tokenizer = plan_tokenizer(plan)
    tasks = named_tasks(evaluation)
    notices = [*missing, *plan.notices, *without_effect(job, [name for name, _ in tasks])]
    longest = min(filter(None, (evaluation.seq_length, plan.shape.max_position_embeddings)))
    rows: list[tuple[str, str]] = []
    planned: list[Work] = []
    for name, path in tasks:
        if is_placeholder(name):
            notices.append(f"--task {name}: is a placeholder")
        elif path is not None and not path.exists():
            notices.append(f"--task-data-path {path} is not there: no question of {name} is checked")
        else:
            task = plan_task(job, name, path, tokenizer, longest, notices)
            rows.append((name, _told(task)))
            planned.append(_work(job, task, tokenizer, longest))
            continue
        rows.append((name, "questions are not there"))
    if evaluation.output_dir is not None:
        names = [name for name, _ in rows]
        folders = [
            f"{evaluation.output_dir}/{name}" if len(names) > 1 else evaluation.output_dir for name in names
        ]
        rows += [("would write", f"{folder}/results.json, {folder}/records.jsonl") for folder in folders]
    if environ.get("RANK", "0") != "0":
        return
    dtype, notice = compute_dtype(evaluation.bf16, evaluation.fp16)
    for text in (*notices, *([notice] if notice else [])):
        print(f"notice: {text}", file=sys.stderr)
    world_size = job.runtime.resolve_world_size(job.parallel, environ)
    work = Work.most(planned or [_longest(evaluation, longest)])
    table = [*model_rows(plan, world_size, dtype), *rows]
    table += predicted_rows(plan, work, world_size, dtype)
    print("\n".join(layout_lines(table, None)))
    print("dry run: everything checked, nothing written")


def _longest(evaluation: EvaluationConfig, longest: int) -> Work:
    """Prompts as long as the model reads, where they are not known."""
    batch = evaluation.evaluation_batch_size
    return Work(batch, longest, batch * longest, batch)


def _work(
    job: EvaluationJob,
    task: BenchmarkPlan | HarnessPlan,
    tokenizer: PreTrainedTokenizerBase | None,
    longest: int,
) -> Work:
    """The task's longest question, as many at once as ``--evaluation-batch-size`` says."""
    evaluation, batch = job.evaluation, job.evaluation.evaluation_batch_size
    if isinstance(task, HarnessPlan) or tokenizer is None or not task.questions:
        return _longest(evaluation, longest)
    encoder = QuestionEncoder(
        PromptEncoder(tokenizer, job.tokenizer), longest, evaluation.instruction_template
    )
    works = []
    for generated in (False, True):
        kind = [
            one
            for one in task.questions
            if task.benchmark.generates(one, evaluation.origin_postprocess) is generated
        ]
        if not kind:
            continue
        question = max(kind, key=_characters)
        if not generated:
            asked = encoder.to_score(question)
            more = max(map(len, asked.continuations))
            rows = batch * (len(asked.continuations) if more > 1 else 1)
            size = batch * len(asked.tokens)
            works.append(Work(rows, len(asked.tokens) + more, size, rows * more))
        else:
            asked = encoder.to_generate(question, task.max_new_tokens)
            requests, beams = [asked.to_generate(task.max_new_tokens)] * batch, task.benchmark.num_beams
            works.append(Work.of_beams(requests, batch, beams))
    return Work.most(works)


def _characters(question: Question) -> int:
    """About how long a question is with its examples."""
    return len(question.text) + sum(len(shot.question) + len(shot.answer) for shot in question.shots)


def _told(task: BenchmarkPlan | HarnessPlan) -> str:
    if isinstance(task, HarnessPlan):
        return "by lm-evaluation-harness"
    subjects = {question.subject for question in task.questions}
    return f"{len(task.questions)} questions in {len(subjects)} subjects"
