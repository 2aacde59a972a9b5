"""What a benchmark is: questions out of files, and what an answer is worth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_lora.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Shot:
    """A solved example."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question, before it is put into the model's form."""

    subject: str
    index: int
    """From 0 in the subject's file."""
    text: str
    """Ends where the answer begins."""
    answer: str | None
    """What is right, one of the labels or a text; None: the file does not tell."""
    labels: tuple[str, ...] = ()
    """Names of the choices; none: the answer is generated."""
    choices: tuple[str, ...] = ()
    """The texts of the choices, as they continue the question."""
    instruction: str = ""
    shots: tuple[Shot, ...] = ()
    separator: str = " "
    """Between the question and its answer."""
    data: Any = None
    """What judging an answer needs besides."""


@dataclass(frozen=True)
class Verdict:
    """What a generated answer says, and whether that is right (of several parts, which share); None: nobody knows."""

    prediction: str | None
    correct: bool | float | None


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What the flags say about one task."""

    path: Path
    tokenizer: PreTrainedTokenizerBase | None = None
    """None in a dry run without one."""
    longest: int = 4096
    """Tokens of a prompt and its answer."""
    fewshot_path: Path | None = None
    num_fewshot: int | None = None
    language: str | None = None
    alternative_prompt: bool = False
    chain_of_thought: bool = False
    greedy: bool = False
    limit: int | None = None
    """Questions of each subject."""
    code_timeout: float = 10.0
    context_lengths: tuple[int, ...] | None = None
    needle_depths: tuple[float, ...] = (0.0,)
    needle_task: str = "single"
    num_needles: int = 2
    max_new_tokens: int | None = None
    notices: list[str] = field(default_factory=list)
    """Where a benchmark tells what it took for granted."""


EXAMPLES = frozenset({"num_fewshot", "fewshot_path"})
ORIGIN, SCORE = "origin_postprocess", "choice_score"
CHOICES = frozenset({ORIGIN, SCORE})
SPECIFIC = (
    *sorted(EXAMPLES),
    "fewshot_as_multiturn",
    *sorted(CHOICES),
    "eval_language",
    "alternative_prompt",
    "chain_of_thought",
    "greedy",
    "allow_code_execution",
    "code_timeout",
    "context_lengths",
    "needle_depths",
    "needle_task",
    "num_needles",
)
"""Fields of the configuration that some benchmarks only heed."""


class Benchmark(ABC):
    """A set of questions with its way to ask and to judge."""

    name: str
    takes: frozenset[str] = frozenset()
    """Fields of the configuration, of those in :data:`SPECIFIC`, that change what is asked here."""
    shots = 0
    """Solved examples in front of a question, where their file is there and the user says nothing."""
    max_new_tokens = 32
    """Of a generated answer."""
    stop_words: tuple[str, ...] = ("\n\n",)
    """What ends an answer to plain text; in a conversation the model ends its turn itself."""
    num_beams = 1
    choice_score = "sum"

    @abstractmethod
    def questions(self, settings: TaskSettings) -> list[Question]:
        """All questions, subject by subject.

        Raises:
            Refused: a file, a subject or a column is missing, or a row cannot be read.
        """

    def generates(self, question: Question, origin_postprocess: bool) -> bool:
        """Whether an answer is written, in place of choices being compared (``--origin-postprocess``: always)."""
        return not question.labels or (origin_postprocess and ORIGIN in self.takes)

    @abstractmethod
    def judge(self, question: Question, text: str) -> Verdict:
        """What a generated answer is worth."""


def taken_shots(
    settings: TaskSettings, wanted: int, shots: Sequence[Shot], source: object
) -> tuple[Shot, ...]:
    """The first examples of a file, as many as are asked for.

    Raises:
        Refused: ``--num-fewshot`` asks for more than there are.
    """
    count = wanted if settings.num_fewshot is None else settings.num_fewshot
    if settings.num_fewshot is not None and count > len(shots):
        raise Refused(
            f"--num-fewshot {count}: {source} holds {len(shots)} examples; give at most that number"
        )
    return tuple(shots[:count])


def limited(settings: TaskSettings, rows: Iterable[Any]) -> list[Any]:
    """The first rows of a subject, as many as ``--max-eval-samples`` says."""
    return list(rows)[: settings.limit]
