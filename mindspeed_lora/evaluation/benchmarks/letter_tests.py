"""Tests with four choices in CSV files, one file a subject: MMLU, CMMLU, C-Eval.

MMLU (Hendrycks et al. 2020, arXiv 2009.03300) is asked in its published form, which lm-evaluation-harness has too.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from mindspeed_lora.evaluation.files import Row, files_in, read_csv
from mindspeed_lora.evaluation.patterns import first_letter

LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Layout:
    """How the files of a test look."""

    suffixes: tuple[str, ...]
    """Ends of the names of files with questions, the first that any file has counts; what is before is the subject."""
    example_suffix: str
    """The end of the names of files with examples, in the folder ``dev`` beside that of the questions."""
    question: str
    answer: str
    header: bool
    unanswered: str | None = None
    """The suffix of files that have no answers."""


class LetterTest(Benchmark):
    """A test with four choices."""

    takes = EXAMPLES | CHOICES | {"eval_language", "alternative_prompt"}
    shots = 5
    max_new_tokens = 8
    stop_words = ("\n",)

    def __init__(self, name: str, layout: Layout, language: str, choice_score: str = "sum") -> None:
        self.name = name
        self.layout = layout
        self.language = language
        self.choice_score = choice_score
        self.needs_examples = name == "mmlu_ppl"

    def questions(self, settings: TaskSettings) -> list[Question]:
        """All questions; see the base class."""
        language = settings.language or self.language
        folder, files = self._files(settings.path)
        examples = self._examples(settings, folder)
        found = []
        for subject, file, answered in files:
            # In the other form every question says what it is, the examples too.
            instruction, each = _instruction(subject, language), ""
            if settings.alternative_prompt:
                instruction, each = "", _said_each_time(subject, language)
            shots = self._shots(settings, examples, subject, language, each)
            rows = limited(settings, self._rows(file, answered))
            found += [
                Question(
                    subject=subject,
                    index=index,
                    text=each + _text(row, self.layout.question, language),
                    answer=_answer(file, number, row[self.layout.answer]) if answered else None,
                    labels=LETTERS,
                    choices=LETTERS,
                    instruction=instruction,
                    shots=shots,
                    data=row.get("id"),
                )
                for index, (number, row) in enumerate(rows)
            ]
        return found

    def judge(self, question: Question, text: str) -> Verdict:
        """The first letter of the text."""
        letter = first_letter(text, LETTERS)
        return Verdict(letter, None if question.answer is None else letter == question.answer)

    def _files(self, path: Path) -> tuple[Path, list[tuple[str, Path, bool]]]:
        """The folder of the questions, and subject, file, and whether it has answers, of each file."""
        layout = self.layout
        if path.is_dir() and not any(path.glob("*.csv")):
            # The folder above, as the benchmark is unpacked.
            inner = [path / name for name in ("test", "val") if (path / name).is_dir()]
            path = inner[0] if inner else path
        for suffix in layout.suffixes:
            if path.is_file() or any(path.glob(f"*{suffix}")):
                return path if path.is_dir() else path.parent, [
                    (file.name.removesuffix(suffix).removesuffix(".csv"), file, suffix != layout.unanswered)
                    for file in files_in(path, f"*{suffix}")
                ]
        files_in(path, f"*{layout.suffixes[0]}")
        raise AssertionError("refused above")

    def _rows(self, file: Path, answered: bool = True) -> list[tuple[int, Row]]:
        columns = [self.layout.question, *LETTERS, *([self.layout.answer] if answered else [])]
        return read_csv(file, columns, self.layout.header)

    def _examples(self, settings: TaskSettings, folder: Path) -> Path | None:
        """The folder of the examples; None: there are none, and none are asked for."""
        if settings.num_fewshot == 0:
            return None
        examples = settings.fewshot_path or folder.parent / "dev"
        if examples.is_dir():
            return examples
        if settings.fewshot_path is not None or settings.num_fewshot or self.needs_examples:
            raise Refused(
                f"{examples}: there is no such folder with the solved examples of {self.name}; name it with "
                "--fewshot-path, or give --num-fewshot 0"
            )
        settings.notices.append(
            f"default taken: --num-fewshot 0 for {self.name}: there is no folder {examples} with solved examples"
        )
        return None

    def _shots(
        self, settings: TaskSettings, examples: Path | None, subject: str, language: str, each: str
    ) -> tuple[Shot, ...]:
        if examples is None:
            return ()
        file = examples / f"{subject}{self.layout.example_suffix}"
        if not file.is_file():
            raise Refused(f"{file}: is not there; it holds the solved examples of the subject {subject}")
        shots = [
            Shot(
                each + _text(row, self.layout.question, language),
                _answer(file, number, row[self.layout.answer]),
            )
            for number, row in self._rows(file)
        ]
        return taken_shots(settings, self.shots, shots, file)


def mmlu() -> LetterTest:
    """``{subject}_test.csv`` without header: question, A, B, C, D, answer; examples in ``../dev/{subject}_dev.csv``."""
    return LetterTest("mmlu", _MMLU, "en")


def mmlu_ppl() -> LetterTest:
    """MMLU by perplexity: the mean over an answer's tokens; it needs the examples."""
    return LetterTest("mmlu_ppl", _MMLU, "en", "tokens")


def cmmlu() -> LetterTest:
    """``{subject}.csv`` with header; examples in ``../dev/{subject}.csv``."""
    return LetterTest("cmmlu", Layout((".csv",), ".csv", "Question", "Answer", True), "zh")


def ceval() -> LetterTest:
    """``{subject}_val.csv`` with header, or ``{subject}_test.csv`` without answers; ``../dev/{subject}_dev.csv``."""
    suffixes = ("_val.csv", "_test.csv")
    return LetterTest("ceval", Layout(suffixes, "_dev.csv", "question", "answer", True, suffixes[1]), "zh")


_MMLU = Layout(("_test.csv",), "_dev.csv", "question", "answer", False)


def _instruction(subject: str, language: str) -> str:
    words = " ".join(subject.split("_"))
    if language == "zh":
        return f"下面是单项选择题，科目：{words}。请选出正确的选项。"
    return f"The following are multiple choice questions (with answers) about {words}."


def _said_each_time(subject: str, language: str) -> str:
    """What stands in front of every question in the form of ``--alternative-prompt``."""
    words = " ".join(subject.split("_"))
    if language == "zh":
        return f"请回答下面这道关于{words}的单项选择题，只写出选项字母。\n问题："
    return f"Choose the right answer to this question about {words}; reply with its letter, A, B, C or D.\nQuestion: "


def _text(row: Row, question: str, language: str) -> str:
    choices = [f"{letter}. {row[letter]}" for letter in LETTERS]
    return "\n".join([row[question].strip(), *choices, "答案：" if language == "zh" else "Answer:"])


def _answer(file: Path, number: int, answer: str) -> str:
    letter = answer.strip().upper()
    if letter not in LETTERS:
        raise Refused(f"{file}, row {number}: the answer is {answer!r}; expected {', '.join(LETTERS)}")
    return letter
