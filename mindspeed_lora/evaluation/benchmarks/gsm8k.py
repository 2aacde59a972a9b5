"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): a number out of a few steps of arithmetic."""

from __future__ import annotations

import math
from pathlib import Path

from mindspeed_lora.errors import Refused
from mindspeed_lora.evaluation.benchmark import (
    EXAMPLES,
    Benchmark,
    Question,
    Shot,
    TaskSettings,
    Verdict,
    limited,
    taken_shots,
)
from mindspeed_lora.evaluation.files import Row, files_in, read_jsonl, subject_of
from mindspeed_lora.evaluation.patterns import last_number, plain_number

_KEYS = ("question", "answer")


class Gsm8k(Benchmark):
    """JSONL files with question and answer, the latter ending with ``#### N``."""

    name = "gsm8k"
    takes = EXAMPLES | {"chain_of_thought"}
    shots = 3
    max_new_tokens = 256
    stop_words = ("\nQuestion:", "\n\n\n")

    def questions(self, settings: TaskSettings) -> list[Question]:
        """All questions; see the base class."""
        shots = self._shots(settings)
        instruction = (
            "Solve each problem step by step, then end with: The answer is <number>."
            if settings.chain_of_thought
            else "Solve each problem and end with: The answer is <number>."
        )
        found = []
        for file in files_in(settings.path, "*.jsonl"):
            for index, row in enumerate(limited(settings, read_jsonl(file, _KEYS))):
                found.append(
                    Question(
                        subject=subject_of(file),
                        index=index,
                        text=f"Question: {row['question'].strip()}\nAnswer:",
                        answer=_solution(row, file, index)[1],
                        instruction=instruction,
                        shots=shots,
                    )
                )
        return found

    def judge(self, question: Question, text: str) -> Verdict:
        """The number that the text ends with."""
        number = last_number(text)
        return Verdict(number, number is not None and float(number) == float(question.answer or "nan"))

    def _shots(self, settings: TaskSettings) -> tuple[Shot, ...]:
        if settings.fewshot_path is None:
            if settings.num_fewshot:
                raise Refused("--num-fewshot for gsm8k needs --fewshot-path: a JSONL file of solved problems")
            return ()
        (file, *_) = files_in(settings.fewshot_path, "*.jsonl", "--fewshot-path")
        shots = []
        for index, row in enumerate(read_jsonl(file, _KEYS)):
            steps, number = _solution(row, file, index)
            steps = f"{steps} " if settings.chain_of_thought and steps else ""
            shots.append(
                Shot(f"Question: {row['question'].strip()}\nAnswer:", f"{steps}The answer is {number}.")
            )
        return taken_shots(settings, 4 if settings.chain_of_thought else self.shots, shots, file)


def _solution(row: Row, file: Path, index: int) -> tuple[str, str]:
    """Steps and number of an answer."""
    steps, mark, number = str(row["answer"]).rpartition("####")
    number = plain_number(number.strip())
    if not mark or not _is_number(number):
        raise Refused(f"{file}, question {index}: the answer does not end with #### and a number")
    return steps.strip(), number


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
