"""NeedleBench (Li et al. 2024, arXiv 2407.11963): sentences are hidden in a long text.

One needle; several that are asked for at once (its multi-needle retrieval); or several that must be combined (its
multi-needle reasoning).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_lora.errors import Refused
from mindspeed_lora.evaluation.benchmark import Benchmark, Question, TaskSettings, Verdict, limited
from mindspeed_lora.evaluation.files import Row, files_in, read_jsonl, read_list

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEEDLES = "needles.jsonl"
_REASONING = "multi_needle_reasoning_{language}.json"
_NOT_TEXTS = (_NEEDLES, "names.jsonl")
_KEYS = ("needle", "retrieval_question", "arg2", "language")
_REASONING_KEYS = ("derivations", "question", "answer")
_ROOM = 128
"""Tokens of the text's length that are left for needles and question, at least."""
_AROUND = 48
"""Tokens of what stands around the question."""
_APART = 10.0
"""Percent of the text between two needles that must be combined."""


@dataclass(frozen=True)
class _Hunt:
    """Needles and what is asked about them."""

    needles: tuple[str, ...]
    question: str
    answers: tuple[str, ...]


class NeedleBench(Benchmark):
    """OpenCompass's folder: ``needles.jsonl`` (needle, retrieval_question, arg2, language), and JSONL files with text.

    A text is cut to each of the lengths, and a needle put at each of the depths; an answer that names the keyword
    (``arg2``) is right. ``--needle-task retrieval`` puts different needles at all depths and asks for all keywords;
    ``reasoning`` takes ``multi_needle_reasoning_{en,zh}.json`` (derivations, question, answer) and
    puts the first needle at the depth, the others behind it. Of several keywords, the words of an answer, each counts
    alike.
    """

    name = "needlebench"
    takes = frozenset({"eval_language", "context_lengths", "needle_depths", "needle_task", "num_needles"})
    max_new_tokens = 48
    stop_words = ("\n\n",)

    def questions(self, settings: TaskSettings) -> list[Question]:
        """All questions; see the base class."""
        if not settings.path.is_dir():
            raise Refused(
                f"--task-data-path {settings.path}: is no folder; name OpenCompass's NeedleBench folder"
            )
        language = settings.language or "en"
        if settings.needle_task == "retrieval":
            self.max_new_tokens *= len(settings.needle_depths)
        hunts = _hunts(settings, language)
        if settings.tokenizer is None:
            return []
        texts, found = _Texts(settings.path, language, settings.tokenizer), []
        for length in self._lengths(settings):
            for subject, depths in _places(settings, length):
                for index, hunt in enumerate(hunts):
                    text = texts.cut(length - texts.room(hunt))
                    found.append(
                        Question(
                            subject=subject,
                            index=index,
                            text=_ask(_hide(text, hunt.needles, depths, language), hunt.question, language),
                            answer="; ".join(hunt.answers),
                            data=hunt.answers,
                        )
                    )
        return found

    def judge(self, question: Question, text: str) -> Verdict:
        """Whether the keyword is in the text; of several which share of them."""
        said, keywords = text.lower(), question.data
        right = [keyword.lower() in said for keyword in keywords]
        return Verdict(text.strip(), right[0] if len(right) == 1 else sum(right) / len(right))

    def _lengths(self, settings: TaskSettings) -> tuple[int, ...]:
        most = settings.longest - (settings.max_new_tokens or self.max_new_tokens)
        lengths = settings.context_lengths or tuple(size for size in (most // 2, most) if size >= 2 * _ROOM)
        for length in lengths:
            if not 2 * _ROOM <= length <= most:
                raise Refused(
                    f"--context-lengths {length}: the model reads {most} tokens in front of an answer; give "
                    f"{2 * _ROOM} to {most}"
                )
        if not lengths:
            raise Refused(f"needlebench: the model reads {most} tokens, but {2 * _ROOM} are needed")
        return lengths


def _places(settings: TaskSettings, length: int) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Each subject's name, and the depths of its needles in percent."""
    if settings.needle_task == "retrieval":
        yield f"{length} tokens, {len(settings.needle_depths)} needles", settings.needle_depths
        return
    several = f", {settings.num_needles} needles" if settings.needle_task == "reasoning" else ""
    count = settings.num_needles if several else 1
    for depth in settings.needle_depths:
        depths = tuple(min(100.0, depth + number * _APART) for number in range(count))
        yield f"{length} tokens, depth {depth:g}%{several}", depths


def _hunts(settings: TaskSettings, language: str) -> list[_Hunt]:
    """What is hidden and asked for, from the files."""
    if settings.needle_task == "reasoning":
        return _to_combine(settings, settings.path / _REASONING.format(language=language))
    wanted = "English" if language == "en" else "Chinese"
    file = settings.path / _NEEDLES
    rows = [row for row in read_jsonl(file, _KEYS) if row["language"] == wanted]
    if not rows:
        raise Refused(f"{file}: holds no needle whose language is {wanted}")
    if settings.needle_task == "single":
        return [
            _Hunt((row["needle"],), row["retrieval_question"], (_keyword(row, "arg2", file),))
            for row in limited(settings, rows)
        ]
    count = len(settings.needle_depths)
    rows = _different(rows)
    if len(rows) < count:
        raise Refused(
            f"{file}: holds {len(rows)} different needles whose language is {wanted}, but --needle-depths names "
            f"{count} places; name fewer"
        )
    groups = [rows[start : start + count] for start in range(0, len(rows) - count + 1, count)]
    return [
        _Hunt(
            tuple(row["needle"] for row in group),
            "\n".join(f"{number}. {row['retrieval_question']}" for number, row in enumerate(group, 1)),
            tuple(_keyword(row, "arg2", file) for row in group),
        )
        for group in limited(settings, groups)
    ]


def _keyword(row: Row, key: str, file: Path) -> str:
    """What a right answer names: an empty one would be found in every answer."""
    value = row[key]
    if not isinstance(value, (str, int, float)) or not str(value).strip():
        raise Refused(f"{file}: the {key} of a question is {value!r}; expected a keyword")
    return str(value).strip()


def _different(rows: Sequence[Row]) -> list[Row]:
    """Needles of which no two share their keyword or what it is asked of."""
    found: list[Row] = []
    seen: set[tuple[str, Any]] = set()
    for row in rows:
        keys = {("arg2", row["arg2"]), ("arg1", row.get("arg1", row["retrieval_question"]))}
        if not keys & seen:
            seen |= keys
            found.append(row)
    return found


def _to_combine(settings: TaskSettings, file: Path) -> list[_Hunt]:
    """The questions over so many needles."""
    rows = read_list(file, _REASONING_KEYS)
    counts = sorted({len(row["derivations"]) for row in rows})
    found = [
        _Hunt(tuple(row["derivations"]), row["question"], tuple(_keyword(row, "answer", file).split()))
        for row in rows
        if len(row["derivations"]) == settings.num_needles
    ]
    if not found:
        raise Refused(
            f"--num-needles {settings.num_needles}: {file} has no such question; it has those over "
            f"{', '.join(map(str, counts))} needles"
        )
    return list(limited(settings, found))


class _Texts:
    """The folder's texts in a language as tokens, which begin anew where they end.

    Args:
        folder: of the benchmark.
        language: ``en`` or ``zh``.
        tokenizer: counts and cuts.
    """

    def __init__(self, folder: Path, language: str, tokenizer: PreTrainedTokenizerBase) -> None:
        files = [
            file
            for file in files_in(folder, "*.jsonl")
            if file.name.startswith("zh_") == (language == "zh") and file.name not in _NOT_TEXTS
        ]
        if not files:
            raise Refused(f"{folder}: holds no JSONL file with texts in the language {language}")
        self._folder, self._tokenizer = folder, tokenizer
        self._texts = [str(row["text"]) for file in files for row in read_jsonl(file, ("text",))]
        self._next = 0
        self._tokens: list[int] = []

    def cut(self, length: int) -> str:
        """So many tokens of them."""
        while len(self._tokens) < length:
            if self._next == len(self._texts) and not self._tokens:
                raise Refused(f"{self._folder}: its texts are empty")
            self._tokens += self._encode(self._texts[self._next % len(self._texts)])
            self._next += 1
        return str(self._tokenizer.decode(self._tokens[:length], skip_special_tokens=True))

    def room(self, hunt: _Hunt) -> int:
        """Tokens that a text leaves for the needles and the question."""
        told = sum(len(self._encode(text)) for text in (*hunt.needles, hunt.question))
        return max(_ROOM, told + _AROUND)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _hide(text: str, needles: Sequence[str], depths: Sequence[float], language: str) -> str:
    """The text with each needle at the end of the sentence that is nearest before its place."""
    places = [_place(text, depth, language) for depth in depths]
    # From the last one on, so that the places before it stay where they are.
    for place, needle in sorted(zip(places, needles, strict=True), key=lambda pair: -pair[0]):
        text = f"{text[:place].rstrip()} {needle.strip()} {text[place:].lstrip()}".strip()
    return text


def _place(text: str, depth: float, language: str) -> int:
    place = int(len(text) * depth / 100)
    if 0 < place < len(text):
        end = text.rfind("。" if language == "zh" else ". ", 0, place)
        place = end + 1 if end >= 0 else 0
    return place


def _ask(text: str, question: str, language: str) -> str:
    if language == "zh":
        return f"请阅读下面的文章，并回答文章后面的问题。\n\n{text}\n\n问题：{question}\n答案："
    return f"Read the text and answer the question behind it.\n\n{text}\n\nQuestion: {question}\nAnswer:"
