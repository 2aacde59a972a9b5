"""HellaSwag (Zellers et al. 2019, arXiv 1905.07830): which of four endings goes on."""

from __future__ import annotations

import re

from mindspeed_lora.errors import Refused
from mindspeed_lora.evaluation.benchmark import SCORE, Benchmark, Question, TaskSettings, Verdict, limited
from mindspeed_lora.evaluation.files import files_in, read_jsonl, subject_of

_KEYS = ("activity_label", "ctx_a", "ctx_b", "endings", "label")


class HellaSwag(Benchmark):
    """JSONL files whose names hold ``val``, with activity_label, ctx_a, ctx_b, endings and label."""

    name = "hellaswag"
    takes = frozenset({SCORE})
    """Endings have no letters in the question that a model could write."""

    def questions(self, settings: TaskSettings) -> list[Question]:
        """All questions; see the base class."""
        found = []
        for file in files_in(settings.path, "*val*.jsonl"):
            for index, row in enumerate(limited(settings, read_jsonl(file, _KEYS))):
                endings = tuple(_clean(ending) for ending in row["endings"] or ())
                if not endings:
                    raise Refused(f"{file}, question {index}: has no endings")
                labels = tuple(str(number) for number in range(len(endings)))
                answer = str(row["label"])
                if answer not in labels:
                    raise Refused(
                        f"{file}, question {index}: the label is {answer!r}; expected {', '.join(labels)}"
                    )
                context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
                found.append(
                    Question(
                        subject=subject_of(file),
                        index=index,
                        text=_clean(context),
                        answer=answer,
                        labels=labels,
                        choices=endings,
                    )
                )
        return found

    def judge(self, question: Question, text: str) -> Verdict:
        """Endings are compared; none is generated."""
        raise AssertionError("hellaswag does not take --origin-postprocess")


def _clean(text: str) -> str:
    """Without the marks that WikiHow's texts have in the files."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
