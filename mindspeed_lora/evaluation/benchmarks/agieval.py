"""AGIEval (Zhong et al. 2023, arXiv 2304.06364): examinations of people, in English and Chinese."""

from __future__ import annotations

import string
from collections.abc import Callable
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
from mindspeed_lora.evaluation.patterns import all_letters, first_letter, normalised, stated

_KEYS = ("question",)
_OPTIONAL = ("passage",)
_LETTERS = tuple(string.ascii_uppercase)
_CHINESE = ("gaokao", "jec-qa", "logiqa-zh")
"""Beginnings of the names of subjects in Chinese."""


class AgiEval(Benchmark):
    """``{subject}.jsonl`` with passage, question, options, label, answer; examples alike in ``--fewshot-path``.

    One right letter: the choices are compared. Several right letters, or no options: the answer is generated.
    """

    name = "agieval"
    takes = EXAMPLES | CHOICES | {"eval_language", "alternative_prompt"}
    shots = 5
    max_new_tokens = 64
    stop_words = ("\n",)

    def questions(self, settings: TaskSettings) -> list[Question]:
        """All questions; see the base class."""
        found = []
        for file in files_in(settings.path, "*.jsonl"):
            language = settings.language or ("zh" if subject_of(file).startswith(_CHINESE) else "en")
            ask = _text_to_end if settings.alternative_prompt else _text
            shots = self._shots(settings, file, language, ask)
            rows = read_jsonl(file, _KEYS, _OPTIONAL)
            answers = [_right(row, file, index) for index, row in enumerate(rows)]
            several = any(
                len(right) > 1 for right, row in zip(answers, rows, strict=True) if row.get("options")
            )
            unanswered = [str(index) for index, right in enumerate(answers) if not right]
            if unanswered:
                settings.notices.append(
                    f"{file}: names no right option of question {', '.join(unanswered)}; whatever is answered "
                    "counts as wrong"
                )
            for index, row in enumerate(limited(settings, rows)):
                options = row.get("options") or ()
                labels = _LETTERS[: len(options)] if options and not several else ()
                found.append(
                    Question(
                        subject=subject_of(file),
                        index=index,
                        text=ask(row, language),
                        answer=answers[index],
                        labels=labels,
                        choices=labels,
                        shots=shots,
                        data=_LETTERS[: len(options)],
                    )
                )
        return found

    def judge(self, question: Question, text: str) -> Verdict:
        """The letters of the text, or the text itself."""
        if question.labels:
            prediction = first_letter(text, question.labels)
            return Verdict(prediction, prediction == question.answer)
        if question.data:
            letters = all_letters(text, question.data)
            return Verdict(letters or None, letters != "" and letters == question.answer)
        said = stated(text)
        prediction = (said if said is not None else text.strip().partition("\n")[0]).strip("$ ")
        return Verdict(prediction, normalised(prediction) == normalised((question.answer or "").strip("$ ")))

    def _shots(
        self, settings: TaskSettings, file: Path, language: str, ask: Callable[[Row, str], str]
    ) -> tuple[Shot, ...]:
        if settings.fewshot_path is None:
            if settings.num_fewshot:
                raise Refused("--num-fewshot for agieval needs --fewshot-path: a folder of {subject}.jsonl")
            return ()
        examples = settings.fewshot_path / file.name
        if not examples.is_file():
            raise Refused(f"{examples}: is not there; it holds the solved examples of {file.stem}")
        rows = read_jsonl(examples, _KEYS, _OPTIONAL)
        shots = [Shot(ask(row, language), _right(row, examples, index)) for index, row in enumerate(rows)]
        return taken_shots(settings, self.shots, shots, examples)


def _right(row: Row, file: Path, index: int) -> str:
    """The right letters, sorted, or the answer of a question without options.

    The published files have a question with an empty list of letters, and one with a full stop among them.
    """
    key = "label" if row.get("options") else "answer"
    said = row.get(key)
    if said in (None, "") or (said == [] and key == "answer"):
        raise Refused(f"{file}, question {index}: has no {key}")
    if key == "answer":
        return str(said).strip()
    letters = _LETTERS[: len(row["options"])]
    given = "".join(map(str, said)) if isinstance(said, list) else str(said)
    found = sorted({letter for letter in given.upper() if letter not in " ,()。"})
    if not set(found) <= set(letters) or (given and not found):
        raise Refused(f"{file}, question {index}: the label is {said!r}; expected {', '.join(letters)}")
    return "".join(found)


def _text(row: Row, language: str) -> str:
    words = ("问题：", "选项：", "答案：") if language == "zh" else ("Question: ", "Options:", "Answer:")
    passage = (row.get("passage") or "").strip()
    options = row.get("options") or []
    lines = [passage] if passage else []
    lines += [words[0] + row["question"].strip()]
    lines += [words[1], *map(str.strip, options)] if options else []
    return "\n".join([*lines, words[2]])


def _text_to_end(row: Row, language: str) -> str:
    """The form of ``--alternative-prompt``: without headings, a sentence that the answer ends."""
    passage = (row.get("passage") or "").strip()
    options = row.get("options") or []
    lines = [*([passage] if passage else []), row["question"].strip(), *map(str.strip, options)]
    return "\n".join([*lines, "答案是" if language == "zh" else "The answer is"])
