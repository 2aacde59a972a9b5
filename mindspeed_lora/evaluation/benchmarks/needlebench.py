"""NeedleBench (Li et al. 2024, arXiv 2407.11963), single needle: a sentence is hidden in a long text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mindspeed_lora.errors import Refused
from mindspeed_lora.evaluation.benchmark import Benchmark, Question, TaskSettings, Verdict, limited
from mindspeed_lora.evaluation.files import files_in, read_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEEDLES = "needles.jsonl"
_NOT_TEXTS = (_NEEDLES, "names.jsonl")
_KEYS = ("needle", "retrieval_question", "arg2", "language")
_ROOM = 128
"""Tokens of the text's length that are left for the question around it."""


class NeedleBench(Benchmark):
    """OpenCompass's folder: ``needles.jsonl`` (needle, retrieval_question, arg2, language), and JSONL files with text.

    A text is cut to each of the lengths, and the needle put at each of the depths; an answer that names the keyword
    (``arg2``) is right.
    """

    name = "needlebench"
    max_new_tokens = 48
    stop_words = ("\n\n",)

    def questions(self, settings: TaskSettings) -> list[Question]:
        """All questions; see the base class."""
        if not settings.path.is_dir():
            raise Refused(
                f"--task-data-path {settings.path}: is no folder; name OpenCompass's NeedleBench folder"
            )
        language = settings.language or "en"
        wanted = "English" if language == "en" else "Chinese"
        rows = read_jsonl(settings.path / _NEEDLES, _KEYS)
        needles = limited(settings, [row for row in rows if row["language"] == wanted])
        if not needles:
            raise Refused(f"{settings.path / _NEEDLES}: holds no needle whose language is {wanted}")
        if settings.tokenizer is None:
            return []
        found = []
        for length in self._lengths(settings):
            text = _haystack(settings.path, language, settings.tokenizer, length - _ROOM)
            for depth in settings.needle_depths:
                for index, row in enumerate(needles):
                    found.append(
                        Question(
                            subject=f"{length} tokens, depth {depth:g}%",
                            index=index,
                            text=_ask(
                                _hide(text, row["needle"], depth, language),
                                row["retrieval_question"],
                                language,
                            ),
                            answer=str(row["arg2"]),
                        )
                    )
        return found

    def judge(self, question: Question, text: str) -> Verdict:
        """Whether the keyword is in the text."""
        return Verdict(text.strip(), (question.answer or "").lower() in text.lower())

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


def _haystack(folder: Path, language: str, tokenizer: PreTrainedTokenizerBase, length: int) -> str:
    """So many tokens of the folder's texts in that language, which begin anew where they end."""
    chinese = [file for file in files_in(folder, "*.jsonl") if file.name.startswith("zh_")]
    english = [
        file for file in files_in(folder, "*.jsonl") if file not in chinese and file.name not in _NOT_TEXTS
    ]
    files = chinese if language == "zh" else english
    if not files:
        raise Refused(f"{folder}: holds no JSONL file with texts in the language {language}")
    texts = [str(row["text"]) for file in files for row in read_jsonl(file, ("text",))]
    tokens: list[int] = []
    while len(tokens) < length:
        before = len(tokens)
        for text in texts:
            tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(tokens) >= length:
                break
        if len(tokens) == before:
            raise Refused(f"{folder}: its texts are empty")
    return str(tokenizer.decode(tokens[:length], skip_special_tokens=True))


def _hide(text: str, needle: str, depth: float, language: str) -> str:
    """The text with the needle at the end of the sentence that is nearest before the place."""
    place = int(len(text) * depth / 100)
    if 0 < place < len(text):
        end = text.rfind("。" if language == "zh" else ". ", 0, place)
        place = end + 1 if end >= 0 else 0
    return f"{text[:place].rstrip()} {needle.strip()} {text[place:].lstrip()}".strip()


def _ask(text: str, question: str, language: str) -> str:
    if language == "zh":
        return f"请阅读下面的文章，并回答文章后面的问题。\n\n{text}\n\n问题：{question}\n答案："
    return f"Read the text and answer the question behind it.\n\n{text}\n\nQuestion: {question}\nAnswer:"
