"""HumanEval (Chen et al. 2021, arXiv 2107.03374): functions that are tested by running them."""

from __future__ import annotations

import re

from mindspeed_lora.evaluation.benchmark import Benchmark, Question, TaskSettings, Verdict, limited
from mindspeed_lora.evaluation.files import files_in, read_jsonl, subject_of
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
                        subject=subject_of(file),
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
        row, name = question.data, question.data["entry_point"]
        program = f"{_program(row['prompt'], text, name)}\n\n{row['test']}\n\ncheck({name})\n"
        return Verdict(text, run_program(program, self._timeout).passed)


def _program(prompt: str, text: str, entry_point: str) -> str:
    """The function that was asked for: the prompt completed, or where the answer defines it anew, what the prompt has
    in front of it (imports, functions that it calls) and the answer."""
    head = re.compile(rf"^def {re.escape(entry_point)}\b", flags=re.MULTILINE)
    code = _code(text, head)
    if head.search(code) is None:
        return prompt + code
    asked = head.search(prompt)
    return (prompt if asked is None else prompt[: asked.start()]) + code


def _code(text: str, head: re.Pattern[str]) -> str:
    """What a chat model writes around its code is left out: the first block that has the function, else the first."""
    blocks = [block.partition("\n")[2] for block in text.split("```")[1::2]]
    if not blocks or head.search(text.partition("```")[0]) is not None:
        return text.partition("```")[0] if blocks else text
    return next((block for block in blocks if head.search(block) is not None), blocks[0])
