"""BoolQ (Clark et al. 2019, arXiv 1905.10044): yes or no about a passage."""

from __future__ import annotations

from pathlib import Path

from mindspeed_lora.errors import Refused
from mindspeed_lora.evaluation.benchmark import (
    CHOICES,
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
from mindspeed_lora.evaluation.patterns import first_letter, normalised

_KEYS = ("question", "passage", "answer")
_YES_NO = ("Yes", "No")


class BoolQ(Benchmark):
    """Files whose names hold ``dev``: JSONL with question, passage, answer (true or false), and maybe title."""

    name = "boolq"
    takes = EXAMPLES | CHOICES | {"alternative_prompt"}
    max_new_tokens = 8
    stop_words = ("\n",)

    def questions(self, settings: TaskSettings) -> list[Question]:
        """All questions; see the base class."""
        labels = ("A", "B") if settings.alternative_prompt else _YES_NO
        shots = self._shots(settings, labels)
        found = []
        for file in files_in(settings.path, "*dev*.jsonl"):
            for index, row in enumerate(limited(settings, read_jsonl(file, _KEYS))):
                found.append(
                    Question(
                        subject=subject_of(file),
                        index=index,
                        text=_text(row, labels),
                        answer=_answer(row, labels, file, index),
                        labels=labels,
                        choices=labels,
                        shots=shots,
                    )
                )
        return found

    def judge(self, question: Question, text: str) -> Verdict:
        """The letter, or the first word."""
        if question.labels == _YES_NO:
            word = (normalised(text).split() or [""])[0].strip(".,!").capitalize()
            prediction = word if word in _YES_NO else None
        else:
            prediction = first_letter(text, question.labels)
        return Verdict(prediction, prediction == question.answer)

    def _shots(self, settings: TaskSettings, labels: tuple[str, ...]) -> tuple[Shot, ...]:
        if settings.fewshot_path is None:
            if settings.num_fewshot:
                raise Refused(
                    "--num-fewshot for boolq needs --fewshot-path: a file of questions with answers"
                )
            return ()
        (file, *_) = files_in(settings.fewshot_path, "*.jsonl", "--fewshot-path")
        shots = [
            Shot(_text(row, labels), _answer(row, labels, file, index))
            for index, row in enumerate(read_jsonl(file, _KEYS))
        ]
        return taken_shots(settings, 5, shots, file)


def _answer(row: Row, labels: tuple[str, ...], file: Path, index: int) -> str:
    """The label of what is right."""
    answer = row["answer"]
    if not isinstance(answer, bool):
        raise Refused(f"{file}, question {index}: the answer is {answer!r}; expected true or false")
    return labels[0 if answer else 1]


def _text(row: Row, labels: tuple[str, ...]) -> str:
    question = row["question"].strip().rstrip("?")
    choices = (
        [] if labels == _YES_NO else [f"{label}. {word}" for label, word in zip(labels, _YES_NO, strict=True)]
    )
    return "\n".join([row["passage"].strip(), f"Question: {question}?", *choices, "Answer:"])
