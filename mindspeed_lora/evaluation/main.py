"""``evaluation.py``: plan, join, build, ask, tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindspeed_lora.config.config_file import CONFIG_FILE
from mindspeed_lora.config.jobs import EvaluationJob
from mindspeed_lora.evaluation.dry_run import dry_run
from mindspeed_lora.evaluation.engine import Engine
from mindspeed_lora.evaluation.harness import HarnessPlan, run_harness
from mindspeed_lora.evaluation.plan import BenchmarkPlan, EvaluationPlan, plan_evaluation
from mindspeed_lora.evaluation.records import Record, Tally, table, write
from mindspeed_lora.evaluation.run import BenchmarkRun
from mindspeed_lora.inference.command import keep_config, run_command, say_notices
from mindspeed_lora.inference.session import READING, load_model
from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.parallel.heartbeat import Heartbeat


def evaluate(job: EvaluationJob) -> int:
    """Runs the benchmarks of the job in order; see :func:`mindspeed_lora.inference.command.run_command`."""
    return run_command(job, dry_run, plan_evaluation, _run)


def _run(plan: EvaluationPlan, groups: ParallelGroups, notices: list[str], heartbeat: Heartbeat) -> None:
    heartbeat.mark(READING)
    model, more = load_model(plan, groups)
    batch_size = plan.evaluation.evaluation_batch_size
    engine = Engine(model, groups, plan.tokenizer, plan.ends, batch_size, heartbeat.mark)
    if not groups.is_main:
        engine.follow()
        return
    say_notices((*plan.notices, *notices, *more))
    if plan.evaluation.output_dir is not None:
        file = Path(plan.evaluation.output_dir) / CONFIG_FILE
        keep_config(file, plan.job, "evaluation.py", groups.world_size)
        folders = [folder for task in plan.tasks if (folder := plan.folder(task.name)) is not None]
        say_notices(
            f"the results in {folder} are replaced when the new ones are there"
            for folder in folders
            if (folder / "results.json").exists()
        )
    with engine.asking():
        for task in plan.tasks:
            engine.begin(task.name)
            if isinstance(task, HarnessPlan):
                _tell(plan, task.name, run_harness(engine, plan, task), None)
            else:
                _tell(plan, task.name, _benchmark(engine, plan, task), _submission(task))


def _benchmark(engine: Engine, plan: EvaluationPlan, task: BenchmarkPlan) -> list[Record]:
    """All records of one of our benchmarks; a line for each subject as it is done."""
    run, records = BenchmarkRun(engine, plan, task), []
    for subject, some in run.records():
        records += some
        tally = Tally.of(some)
        print(f"{task.name} {subject}: {tally.right:g} of {tally.n} right", flush=True)
    if run.cut:
        cut = f"{task.name}: {run.cut} prompts are longer than the {plan.longest} tokens that the model reads"
        say_notices([f"{cut}; they were cut in front"])
    return records


def _tell(plan: EvaluationPlan, task: str, records: list[Record], ids: list[Any] | None) -> None:
    """The table, and the files; a submission where no file told what is right."""
    print("\n".join(["", *table(task, records), ""]), flush=True)
    folder = plan.folder(task)
    if folder is None:
        return
    submission: dict[str, Any] | None = None
    if ids is not None:
        submission = {}
        for record, number in zip(records, ids, strict=True):
            key = str(record.index if number is None else number)
            submission.setdefault(record.subject, {})[key] = record.prediction
    write(folder, task, records, submission)
    print(f"written: {folder}/results.json, {folder}/records.jsonl", flush=True)


def _submission(task: BenchmarkPlan) -> list[Any] | None:
    """The questions' own numbers where the answers are with the benchmark's makers."""
    unanswered = all(question.answer is None for question in task.questions)
    return [question.data for question in task.questions] if unanswered else None
