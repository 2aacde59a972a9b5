"""All tasks but chat: every prompt answered, shown, and written to ``--output-file``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from mindspeed_lora.atomic import atomic_file
from mindspeed_lora.inference.generator import Answer
from mindspeed_lora.inference.plan import Prompt
from mindspeed_lora.inference.session import InferenceSession
from mindspeed_lora.parallel.collectives import gather_objects

_RULE = "=" * 15


@dataclass
class _Totals:
    prompts: int = 0
    tokens: int = 0
    seconds: float = 0.0


def answer_prompts(session: InferenceSession, task: str, output: TextIO | None) -> None:
    """Answers all prompts; rank 0 shows the answers and writes them to ``output``."""
    is_main, totals = session.groups.is_main, _Totals()
    several = len(session.plan.job.inference.task) > 1
    if is_main:
        print(f"{_RULE} {task} {_RULE}", flush=True)
    for prompt, answers in _answers(session, task, totals):
        texts = "\n\n".join(session.text(answer).strip() for answer in answers)
        print(f"You: {prompt.text}\n\n{texts}\n", flush=True)
        if output is not None:
            output.write(_json_row(session, prompt, answers, task if several else None))
    if is_main:
        rate = totals.tokens / totals.seconds if totals.seconds else 0.0
        print(
            f"{totals.prompts} prompts, {totals.tokens} tokens, {totals.seconds:.1f} s, {rate:.1f} tokens/s",
            flush=True,
        )


@contextmanager
def output_file(session: InferenceSession) -> Iterator[TextIO | None]:
    """``--output-file`` on rank 0, which takes its name only when everything is in it; None elsewhere."""
    path = session.plan.job.inference.output_file
    if path is None or not session.groups.is_main:
        yield None
        return
    with atomic_file(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as output:
        yield output


def _answers(session: InferenceSession, task: str, totals: _Totals) -> Iterator[tuple[Prompt, list[Answer]]]:
    """The prompts, in order, with their answers, best first, on rank 0; each replica takes every n-th batch."""
    plan, groups = session.plan, session.groups
    size = plan.job.inference.micro_batch_size
    batches = [plan.prompts[start : start + size] for start in range(0, len(plan.prompts), size)]
    for first in range(0, len(batches), groups.dp_size):
        started = time.perf_counter()
        turn = batches[first : first + groups.dp_size]
        batch = turn[groups.dp_rank] if groups.dp_rank < len(turn) else ()
        own = session.answer(task, [prompt.request for prompt in batch])
        gathered = gather_objects((groups.dp_rank, own), groups)
        totals.seconds += time.perf_counter() - started
        if gathered is None:
            continue
        of_replica = dict(gathered)
        for replica, prompts in enumerate(turn):
            totals.prompts += len(prompts)
            totals.tokens += sum(len(answer.tokens) for told in of_replica[replica] for answer in told)
            yield from zip(prompts, of_replica[replica], strict=True)


def _json_row(session: InferenceSession, prompt: Prompt, answers: list[Answer], task: str | None) -> str:
    told = [{"text": session.text(answer), "token_ids": answer.tokens} for answer in answers]
    row: dict[str, object] = {"prompt": prompt.text, **told[0]}
    if len(told) > 1:
        row["others"] = told[1:]
    if task is not None:
        row["task"] = task
    return json.dumps(row, ensure_ascii=False) + "\n"
