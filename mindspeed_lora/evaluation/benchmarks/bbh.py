"""BIG-Bench Hard (Suzgun et al. 2022, arXiv 2210.09261): short answers, with or without reasoning before them."""

from __future__ import annotations

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
from mindspeed_lora.evaluation.files import Row, files_in, read_examples, read_text, subject_of
from mindspeed_lora.evaluation.patterns import normalised, stated

_KEYS = ("input", "target")


class BigBenchHard(Benchmark):
    """``{task}.json`` with ``examples`` of input and target.

    Examples: ``{task}.json`` of the same form in ``--fewshot-path``; with ``--chain-of-thought`` the published
    ``{task}.txt`` there, or in ``cot-prompts`` beside the folder of the questions.
    """

    name = "bbh"
    takes = EXAMPLES | {"chain_of_thought"}
    shots = 3
    max_new_tokens = 64
    stop_words = ("\nQ:", "\n\n")

    def questions(self, settings: TaskSettings) -> list[Question]:
        """All questions; see the base class."""
        found = []
        for file in files_in(settings.path, "*.json"):
            instruction, shots = self._examples(settings, file)
            for index, row in enumerate(limited(settings, read_examples(file, _KEYS))):
                ask = "Think step by step, then say: the answer is" if settings.chain_of_thought else ""
                found.append(
                    Question(
                        subject=subject_of(file),
                        index=index,
                        text=f"Q: {row['input'].strip()}\nA:" + (f" {ask}" if ask and not shots else ""),
                        answer=_target(row, file, index),
                        instruction=instruction,
                        shots=shots,
                        data=settings.chain_of_thought,
                    )
                )
        return found

    def judge(self, question: Question, text: str) -> Verdict:
        """What follows "the answer is", else the first line."""
        said = stated(text)
        prediction = said if said is not None else text.strip().partition("\n")[0]
        right = normalised(question.answer or "")
        found = normalised(prediction)
        # "(B) a text" names the choice (B).
        letter = right.startswith("(") and found.startswith(
            (right, right.strip("()") + ".", right.strip("()") + ")")
        )
        return Verdict(prediction, found == right or letter or found == right.strip("()"))

    def _examples(self, settings: TaskSettings, file: Path) -> tuple[str, tuple[Shot, ...]]:
        folder, wanted = settings.fewshot_path, settings.num_fewshot
        if wanted == 0:
            return "", ()
        if settings.chain_of_thought:
            folder = folder or file.parent.parent / "cot-prompts"
            text = folder / f"{file.stem}.txt"
            if text.is_file():
                return _published(text, settings)
            if settings.fewshot_path is None and not wanted:
                return "", ()
            raise Refused(f"{text}: is not there; it holds the reasoned examples of {file.stem}")
        if folder is None:
            if wanted:
                raise Refused(
                    "--num-fewshot for bbh needs --fewshot-path: a folder of {task}.json with examples"
                )
            return "", ()
        examples = folder / file.name
        if not examples.is_file():
            raise Refused(f"{examples}: is not there; it holds the solved examples of {file.stem}")
        shots = [
            Shot(f"Q: {row['input'].strip()}\nA:", _target(row, examples, index))
            for index, row in enumerate(read_examples(examples, _KEYS))
        ]
        return "", taken_shots(settings, self.shots, shots, examples)


def _target(row: Row, file: Path, index: int) -> str:
    """What is right."""
    target = row["target"]
    if not isinstance(target, (str, int, float)) or not str(target).strip():
        raise Refused(f"{file}, example {index}: the target is {target!r}; expected a text")
    return str(target).strip()


def _published(file: Path, settings: TaskSettings) -> tuple[str, tuple[Shot, ...]]:
    """Instruction and examples of a file of the benchmark's ``cot-prompts``."""
    text = read_text(file).strip()
    # The first part tells machines not to train on the file.
    text = text.rpartition("-----\n")[2] if "-----\n" in text else text
    instruction, *blocks = text.split("\n\nQ:")
    shots = []
    for block in blocks:
        question, mark, answer = block.partition("\nA:")
        if not mark:
            raise Refused(f"{file}: an example has no line that begins with A:")
        shots.append(Shot(f"Q:{question}\nA:", answer.strip()))
    return instruction.strip(), taken_shots(settings, 3, shots, file)
