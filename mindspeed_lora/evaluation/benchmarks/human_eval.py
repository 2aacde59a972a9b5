"""HumanEval (Chen et al. 2021, arXiv 2107.03374): functions that are tested by running them."""

from __future__ import annotations

from mindspeed_lora.evaluation.benchmark import Benchmark, Question, TaskSettings, Verdict, limited
from mindspeed_lora.evaluation.files import files_in, read_jsonl
from mindspeed_lora.evaluation.sandbox import run_program

_KEYS = ("task_id", "prompt", "entry_point", "test")


class HumanEval(Benchmark):
    """JSONL with task_id, prompt, entry_point and test; pass@1 of one completion each."""

    name = "human_eval"
    takes = frozenset({"alternative_prompt", "greedy", "allow_code_execution", "code_timeout"})
    max_new_tokens = 512
    stop_words = ("\ndef ", "\nclass ", "\nif ", "\nprint(", "\n#", "\n@", "\nassert ", "\n```")
    num_beams = 4

    def __init__(self) -> None:
        self._timeout = 10.0

    def questions(self, settings: TaskSettings) -> list[Question]:
        """All questions; see the base class."""
        self._timeout = settings.code_timeout
        if settings.greedy or settings.alternative_prompt:
            self.num_beams = 1
        instruction = "Complete the function; write code only." if settings.alternative_prompt else ""
        found = []
        for file in files_in(settings.path, "*.jsonl"):
            for index, row in enumerate(limited(settings, read_jsonl(file, _KEYS))):
                found.append(
                    Question(
                        subject=file.stem,
                        index=index,
                        text=row["prompt"],
                        answer=row["entry_point"],
                        instruction=instruction,
                        separator="",
                        data=row,
                    )
                )
        return found

    def judge(self, question: Question, text: str) -> Verdict:
        """Runs prompt, completion and test; the prediction is the completion."""
        row = question.data
        body = _code(text, row["entry_point"])
        program = body if f"def {row['entry_point']}" in body else row["prompt"] + body
        program = f"{program}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"
        return Verdict(text, run_program(program, self._timeout).passed)


def _code(text: str, entry_point: str) -> str:
    """What a chat model writes around its code is left out."""
    fence = text.find("```")
    if fence < 0 or f"def {entry_point}" not in text[fence:]:
        return text
    return text[fence:].partition("\n")[2].partition("```")[0]
