"""Everything that is decided before processes join: model, tokenizer, and every question of every benchmark."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mindspeed_lora.config.evaluation import BENCHMARKS, EvaluationConfig
from mindspeed_lora.config.jobs import EvaluationJob
from mindspeed_lora.errors import Refused
from mindspeed_lora.evaluation.benchmark import Benchmark, Question, TaskSettings
from mindspeed_lora.evaluation.benchmarks import benchmark
from mindspeed_lora.evaluation.encoding import QuestionEncoder, check_instruction_template
from mindspeed_lora.evaluation.harness import HarnessPlan, plan_harness
from mindspeed_lora.evaluation.heeded import without_effect
from mindspeed_lora.inference.generation_config import GenerationDefaults, read_generation_defaults
from mindspeed_lora.inference.model_plan import ModelPlan, plan_model, plan_tokenizer
from mindspeed_lora.inference.prompts import PromptEncoder, check_tokens, end_sequences
from mindspeed_lora.inference.sampling import TokenChoice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_MUCH_SHORTER = 8
"""Answers that are allowed less than this part of what their benchmark needs are told: a script's one token is meant
for letters."""


@dataclass(frozen=True)
class BenchmarkPlan:
    """One of our benchmarks with its questions."""

    name: str
    benchmark: Benchmark
    questions: tuple[Question, ...]
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan(ModelPlan):
    """A job, resolved."""

    evaluation: EvaluationConfig
    tokenizer: PreTrainedTokenizerBase
    encoder: PromptEncoder
    longest: int
    """Tokens of a prompt and its answer."""
    defaults: GenerationDefaults
    tasks: tuple[BenchmarkPlan | HarnessPlan, ...]

    @property
    def question_encoder(self) -> QuestionEncoder:
        """How questions become tokens."""
        return QuestionEncoder(self.encoder, self.longest, self.evaluation.instruction_template)

    @property
    def ends(self) -> tuple[tuple[int, ...], ...]:
        """What ends every generated answer."""
        return end_sequences(self.defaults.eos_token_ids, self.encoder)

    @property
    def choice(self) -> TokenChoice:
        """Answers are the likeliest tokens."""
        return TokenChoice(do_sample=False, repetition_penalty=self.defaults.repetition_penalty)

    def folder(self, task: str) -> Path | None:
        """Where a task's results are written: the output folder, with several tasks one of its own in it."""
        if self.evaluation.output_dir is None:
            return None
        folder = Path(self.evaluation.output_dir)
        return folder / task if len(self.tasks) > 1 else folder


def plan_evaluation(job: EvaluationJob) -> EvaluationPlan:
    """Resolves a job.

    Raises:
        Refused: something contradicts, is missing or cannot be.
    """
    return plan_questions(job, plan_model(job))


def plan_questions(job: EvaluationJob, model: ModelPlan) -> EvaluationPlan:
    """Adds the tokenizer, and the questions of every task.

    Raises:
        Refused: a file of questions is missing or cannot be read, or there is no tokenizer.
    """
    check_output_dir(job.evaluation)
    tokenizer = plan_tokenizer(model)
    encoder = PromptEncoder(tokenizer, job.tokenizer)
    longest = min(filter(None, (job.evaluation.seq_length, model.shape.max_position_embeddings)))
    named = named_tasks(job.evaluation)
    notices = [*model.notices, *without_effect(job, [name for name, _ in named])]
    tasks = tuple(plan_task(job, name, path, tokenizer, longest, notices) for name, path in named)
    plan = EvaluationPlan(
        **{field.name: getattr(model, field.name) for field in dataclasses.fields(ModelPlan)},
        evaluation=job.evaluation,
        tokenizer=tokenizer,
        encoder=encoder,
        longest=longest,
        defaults=read_generation_defaults(model.source.config_dir),
        tasks=tasks,
    )
    _check_vocabulary(plan)
    return dataclasses.replace(plan, notices=tuple(notices))


def named_tasks(evaluation: EvaluationConfig) -> list[tuple[str, Path | None]]:
    """Every task with its path."""
    tasks, paths = evaluation.task or (), evaluation.task_data_path or ()
    if len(paths) == len(tasks):
        return [(task, Path(path)) for task, path in zip(tasks, paths, strict=True)]
    return [(task, Path(paths[0]) if paths else None) for task in tasks]


def plan_task(
    job: EvaluationJob,
    name: str,
    path: Path | None,
    tokenizer: PreTrainedTokenizerBase | None,
    longest: int,
    notices: list[str],
) -> BenchmarkPlan | HarnessPlan:
    """One task: ours with its questions, or lm-evaluation-harness's."""
    evaluation = job.evaluation
    if name not in BENCHMARKS:
        return plan_harness(name, path)
    assert path is not None, "config/resolve_evaluation.py refuses a benchmark without its files"
    made = benchmark(name)
    settings = TaskSettings(
        path=path,
        tokenizer=tokenizer,
        longest=longest,
        fewshot_path=Path(evaluation.fewshot_path) if evaluation.fewshot_path is not None else None,
        num_fewshot=evaluation.num_fewshot,
        language=evaluation.eval_language,
        alternative_prompt=evaluation.alternative_prompt,
        chain_of_thought=evaluation.chain_of_thought,
        greedy=evaluation.greedy,
        limit=evaluation.max_eval_samples,
        code_timeout=evaluation.code_timeout,
        context_lengths=evaluation.context_lengths,
        needle_depths=evaluation.needle_depths,
        needle_task=evaluation.needle_task,
        num_needles=evaluation.num_needles,
        max_new_tokens=evaluation.max_new_tokens,
        notices=notices,
    )
    check_instruction_template(evaluation.instruction_template)
    questions = tuple(made.questions(settings))
    most = evaluation.max_new_tokens or made.max_new_tokens
    generates = any(made.generates(question, evaluation.origin_postprocess) for question in questions)
    if generates and most >= longest:
        raise Refused(
            f"{name} generates {most} tokens, but the model reads {longest} tokens of prompt and answer; lower "
            "--max-new-tokens, or raise --seq-length"
        )
    if generates and most < made.max_new_tokens // _MUCH_SHORTER:
        notices.append(
            f"{name} writes its answers: --max-new-tokens {most} cuts them off; left out, they have "
            f"{made.max_new_tokens} tokens"
        )
    return BenchmarkPlan(name, made, questions, most)


def check_output_dir(evaluation: EvaluationConfig) -> None:
    """Finds out now, not after hours, that nothing can be written.

    Raises:
        Refused: with the reason.
    """
    if evaluation.output_dir is None:
        return
    folder = Path(evaluation.output_dir)
    if folder.exists() and not folder.is_dir():
        raise Refused(f"--output-dir {folder}: is a file; name a folder")
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise Refused(f"--output-dir {folder}: no permission to write to {there}; choose another folder")


def _check_vocabulary(plan: EvaluationPlan) -> None:
    """A tokenizer of another model would end in an index out of range, or worse, in numbers."""
    for task in plan.tasks:
        if isinstance(task, BenchmarkPlan) and task.questions:
            tokens = plan.encoder.encode(task.questions[0].text)
            check_tokens(tokens, plan.tokenizer, plan.shape.vocab_size)
