"""What a run of a benchmark tells: a record for each question, and how many were right."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mindspeed_lora.atomic import atomic_file


@dataclass(frozen=True, kw_only=True)
class Record:
    """One question: a line of ``records.jsonl``."""

    subject: str
    index: int
    prompt: str
    choices: list[str]
    loglikelihoods: list[float]
    prediction: str | None
    answer: str | None
    correct: bool | float | None
    """Of an answer in several parts the share that is right; None where nobody knows what is right."""
    text: str | None = None
    """The generated answer; None where choices were compared."""


@dataclass(frozen=True)
class Tally:
    """How many of some questions were answered rightly."""

    right: float
    n: int
    squares: float
    """Sum of the squares; where answers are right or wrong, as many as are right."""

    @classmethod
    def of(cls, records: Iterable[Record]) -> Tally:
        """Of the records whose right answer is known."""
        known = [record.correct for record in records if record.correct is not None]
        return cls(sum(known), len(known), sum(value * value for value in known))

    def as_json(self) -> dict[str, Any]:
        """Accuracy a from 0 to 1, its standard error, and the number n of questions.

        The error is √((Σ x²/n − a²) / (n − 1)); with x of 0 and 1 alone that is √(a (1 − a) / (n − 1)).
        """
        if self.n == 0:
            return {"accuracy": None, "stderr": None, "n": 0}
        accuracy = self.right / self.n
        spread = max(0.0, self.squares / self.n - accuracy * accuracy)
        stderr = math.sqrt(spread / (self.n - 1)) if self.n > 1 else 0.0
        return {"accuracy": accuracy, "stderr": stderr, "n": self.n}


def by_subject(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each subject, in the order in which subjects appear."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.subject, []).append(record)
    return found


def results(task: str, records: Sequence[Record]) -> dict[str, Any]:
    """The content of ``results.json``."""
    return {
        "task": task,
        "total": Tally.of(records).as_json(),
        "subjects": {name: Tally.of(some).as_json() for name, some in by_subject(records).items()},
    }


def write(folder: Path, task: str, records: Sequence[Record], submission: dict[str, Any] | None) -> None:
    """Writes ``records.jsonl``, then ``results.json``, and ``submission.json`` where there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "records.jsonl") as path, path.open("w", encoding="utf-8") as file:
        for record in records:
            row = {key: value for key, value in asdict(record).items() if key != "text" or value is not None}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if submission is not None:
        _write_json(folder / "submission.json", submission)
    _write_json(folder / "results.json", results(task, records))


def table(task: str, records: Sequence[Record]) -> list[str]:
    """Lines for a person: a subject each, and the total."""
    rows = [(name, Tally.of(some)) for name, some in by_subject(records).items()]
    rows = [*rows, (f"{task}, all", Tally.of(records))] if len(rows) != 1 else [(task, rows[0][1])]
    width = max(len("subject"), *(len(name) for name, _ in rows))
    lines = [f"{'subject':<{width}}  {'questions':>9}  {'accuracy':>8}  {'std. error':>10}"]
    for name, tally in rows:
        told = tally.as_json()
        accuracy, stderr = (
            ("-", "-") if tally.n == 0 else (f"{told['accuracy']:.4f}", f"{told['stderr']:.4f}")
        )
        lines.append(f"{name:<{width}}  {tally.n:>9}  {accuracy:>8}  {stderr:>10}")
    return lines


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
