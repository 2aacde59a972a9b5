"""What the benchmarks read out of their files, what they refuse, and how they judge an answer."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mindspeed_lora.config.evaluation import BENCHMARKS
from mindspeed_lora.errors import Refused
from mindspeed_lora.evaluation.benchmark import SPECIFIC, Question, TaskSettings
from mindspeed_lora.evaluation.benchmarks import benchmark
from mindspeed_lora.evaluation.records import Record, Tally
from tests.support.benchmark_files import (
    SUBJECTS,
    letter_rows,
    write_boolq,
    write_csv,
    write_hellaswag,
    write_jsonl,
    write_mmlu,
)


def questions(name: str, path: Path, **settings: Any) -> list[Question]:
    return benchmark(name).questions(TaskSettings(path=path, **settings))


def refusal(name: str, path: Path, **settings: Any) -> str:
    with pytest.raises(Refused) as error:
        questions(name, path, **settings)
    return str(error.value)


def test_every_name_has_a_benchmark() -> None:
    assert [benchmark(name).name for name in BENCHMARKS] == list(BENCHMARKS)


def test_mmlu_reads_questions_and_examples(tmp_path: Path) -> None:
    for path in (write_mmlu(tmp_path), tmp_path):
        found = questions("mmlu", path)
        assert [question.subject for question in found] == [name for name in SUBJECTS for _ in range(6)]
        assert all(len(question.shots) == 5 and question.labels == tuple("ABCD") for question in found)
        assert len(questions("mmlu", path, num_fewshot=2, limit=1)[0].shots) == 2
        assert len(questions("mmlu", path, limit=1)) == 2


def test_mmlu_without_examples_tells_so(tmp_path: Path) -> None:
    path = write_mmlu(tmp_path, shots=0)
    notices: list[str] = []
    assert not any(question.shots for question in questions("mmlu", path, notices=notices))
    assert "default taken: --num-fewshot 0" in notices[0]
    assert "no such folder with the solved examples of mmlu_ppl" in refusal("mmlu_ppl", path)
    assert "no such folder" in refusal("mmlu", path, num_fewshot=5)
    assert "no such folder" in refusal("mmlu", path, fewshot_path=tmp_path / "elsewhere")


def _no_subject(folder: Path) -> None:
    (folder / "dev" / f"{SUBJECTS[1]}_dev.csv").unlink()


def _no_column(folder: Path) -> None:
    write_csv(folder / "test" / f"{SUBJECTS[0]}_test.csv", [["question", "a", "b", "c", "A"]])


def _no_letter(folder: Path) -> None:
    write_csv(folder / "test" / f"{SUBJECTS[0]}_test.csv", [["question", "a", "b", "c", "d", "E"]])


def _no_file(folder: Path) -> None:
    for file in (folder / "test").iterdir():
        file.rename(file.with_suffix(".txt"))


def _nothing(folder: Path) -> None:
    (folder / "test" / f"{SUBJECTS[0]}_test.csv").write_text("\n")


def _latin(folder: Path) -> None:
    (folder / "test" / f"{SUBJECTS[0]}_test.csv").write_bytes("é,a,b,c,d,A\n".encode("latin-1"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_subject, f"{SUBJECTS[1]}_dev.csv: is not there; it holds the solved examples"),
        (_no_column, "row 1: has 5 columns; expected 6"),
        (_no_letter, "row 1: the answer is 'E'; expected A, B, C, D"),
        (_no_file, "holds no file *_test.csv"),
        (_nothing, "holds no row"),
        (_latin, "is not UTF-8"),
    ],
)
def test_what_is_missing_in_mmlu_is_an_error(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    path = write_mmlu(tmp_path)
    damage(tmp_path)
    assert message in refusal("mmlu", path)


def test_cmmlu_and_ceval(tmp_path: Path) -> None:
    import random

    draw = random.Random(4)
    rows = [[str(i), *row] for i, row in enumerate(letter_rows(draw, 4))]
    write_csv(tmp_path / "cmmlu/test/agronomy.csv", [["", "Question", *"ABCD", "Answer"], *rows])
    write_csv(tmp_path / "cmmlu/dev/agronomy.csv", [["", "Question", *"ABCD", "Answer"], *rows[:2]])
    found = questions("cmmlu", tmp_path / "cmmlu/test")
    assert (len(found), len(found[0].shots), found[0].subject) == (4, 2, "agronomy")
    assert found[0].text.endswith("答案：") and "agronomy" in found[0].instruction
    header = ["id", "question", *"ABCD", "answer"]
    write_csv(tmp_path / "ceval/val/law_val.csv", [header, *rows])
    write_csv(tmp_path / "ceval/dev/law_dev.csv", [[*header, "explanation"], *([*row, "so"] for row in rows)])
    assert [question.answer for question in questions("ceval", tmp_path / "ceval/val")] == [
        row[6] for row in rows
    ]
    write_csv(tmp_path / "ceval/test/law_test.csv", [header[:-1], *(row[:-1] for row in rows)])
    unanswered = questions("ceval", tmp_path / "ceval/test")
    assert {question.answer for question in unanswered} == {None} and unanswered[2].data == "2"
    write_csv(tmp_path / "ceval/val/law_val.csv", [header[:-1], *(row[:-1] for row in rows)])
    assert "there is no column answer" in refusal("ceval", tmp_path / "ceval/val")


def test_letter_tests_have_another_form(tmp_path: Path) -> None:
    """Every question says what it is, the examples too, and nothing stands in front of them."""
    path = write_mmlu(tmp_path)
    plain, other = questions("mmlu", path)[6], questions("mmlu", path, alternative_prompt=True)[6]
    assert not other.instruction and other.answer == plain.answer
    told = other.text.removesuffix(plain.text)
    assert told.endswith("reply with its letter, A, B, C or D.\nQuestion: ") and "world religions" in told
    assert [shot.question for shot in other.shots] == [told + shot.question for shot in plain.shots]
    header = ["", "Question", *"ABCD", "Answer"]
    write_csv(tmp_path / "cmmlu/test/law.csv", [header, ["0", "问", *"abcd", "A"]])
    (chinese,) = questions("cmmlu", tmp_path / "cmmlu/test", alternative_prompt=True)
    assert chinese.text.startswith("请回答下面这道关于law的单项选择题") and chinese.text.endswith("答案：")


class _Watched:
    """Settings that remember what was asked of them."""

    def __init__(self, settings: TaskSettings) -> None:
        self.settings, self.asked = settings, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.asked.add({"language": "eval_language"}.get(name, name))
        return getattr(self.settings, name)


def test_benchmarks_tell_which_flags_they_heed(tmp_path: Path) -> None:
    """What a benchmark does not look at is told to have no effect, and nothing else is."""
    write_mmlu(tmp_path / "mmlu"), write_hellaswag(tmp_path / "hellaswag"), write_boolq(tmp_path / "boolq")
    rows = {
        "gsm8k": {"question": "How many?", "answer": "#### 5"},
        "agieval": {"question": "q", "options": ["(A)x", "(B)y"], "label": "B"},
        "human_eval": {"task_id": "0", "prompt": "", "entry_point": "f", "test": ""},
        "needlebench": {"needle": "n", "retrieval_question": "q", "arg2": "a", "language": "English"},
    }
    for name, row in rows.items():
        write_jsonl(tmp_path / name / ("needles.jsonl" if name == "needlebench" else "a.jsonl"), [row])
    (tmp_path / "bbh").mkdir()
    (tmp_path / "bbh/a.json").write_text(json.dumps({"examples": [{"input": "x", "target": "y"}]}))
    by_the_engine = {"origin_postprocess", "choice_score", "allow_code_execution", "context_lengths"}
    for name in ("mmlu", *rows, "bbh", "hellaswag", "boolq"):
        made = benchmark(name)
        watched = _Watched(TaskSettings(path=tmp_path / name, needle_task="retrieval"))
        made.questions(watched)  # type: ignore[arg-type]
        made.questions(_with(watched, needle_task="single"))  # type: ignore[arg-type]
        heeded = set(made.takes) - by_the_engine - {"needle_depths", "num_needles"}
        found = watched.asked & set(SPECIFIC) - by_the_engine - {"needle_depths", "num_needles"}
        assert found == heeded, name


def _with(watched: _Watched, **changed: Any) -> _Watched:
    watched.settings = dataclasses.replace(watched.settings, **changed)
    return watched


def test_boolq_asks_yes_or_no_or_letters(tmp_path: Path) -> None:
    path = write_boolq(tmp_path)
    assert {question.answer for question in questions("boolq", path)} <= {"Yes", "No"}
    other = questions("boolq", path, alternative_prompt=True)[0]
    assert other.labels == ("A", "B") and "A. Yes\nB. No\nAnswer:" in other.text
    write_jsonl(tmp_path / "dev.jsonl", [{"question": "q", "passage": "p", "answer": "yes"}])
    assert "question 0: the answer is 'yes'; expected true or false" in refusal("boolq", path)
    write_jsonl(tmp_path / "dev.jsonl", [{"question": "q", "answer": True}])
    assert "row 1: there is no key passage" in refusal("boolq", path)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("boolq", '{"question": 1, "passage": "p", "answer": true}', "row 1: question is 1; expected a text"),
        ("boolq", '{"question": "q", "passage": null, "answer": true}', "passage is null; expected a text"),
        ("boolq", "[" * 100_000, "row 1: not JSON"),
        (
            "agieval",
            '{"question": "q", "options": [1], "label": "A"}',
            "options is [1]; expected a list of texts",
        ),
        ("agieval", '{"question": "q", "passage": 5, "answer": "1"}', "passage is 5; expected a text"),
        (
            "agieval",
            '{"question": "q", "options": ["(A)x", "(B)y"], "label": "C"}',
            "the label is 'C'; expected A, B",
        ),
        ("gsm8k", "[1]", "row 1: expected an object"),
        ("gsm8k", '{"question": "q", "answer": "#### "}', "does not end with #### and a number"),
        ("gsm8k", '{"question": "q", "answer": "#### 3/4"}', "does not end with #### and a number"),
        (
            "hellaswag",
            '{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": null, "label": 0}',
            "question 0: has no endings",
        ),
    ],
)
def test_rows_of_other_kinds_are_refused(tmp_path: Path, name: str, row: str, message: str) -> None:
    (tmp_path / "dev_val.jsonl").write_text(row + "\n")
    assert message in refusal(name, tmp_path)


def test_what_would_be_judged_wrongly_for_ever_is_refused(tmp_path: Path) -> None:
    """Answers that no text matches, or every text."""
    examples = tmp_path / "examples.jsonl"
    write_jsonl(examples, [{"question": "q", "passage": "p", "answer": "false"}])
    refused = refusal("boolq", write_boolq(tmp_path / "boolq"), fewshot_path=examples)
    assert "examples.jsonl, question 0: the answer is 'false'; expected true or false" in refused
    (tmp_path / "bbh").mkdir()
    for target in (None, "", ["a"]):
        (tmp_path / "bbh/a.json").write_text(json.dumps({"examples": [{"input": "x", "target": target}]}))
        assert f"example 0: the target is {target!r}; expected a text" in refusal("bbh", tmp_path / "bbh")
    needle = {"needle": "n", "retrieval_question": "q", "arg2": "", "language": "English"}
    write_jsonl(tmp_path / "needles/needles.jsonl", [needle])
    assert "the arg2 of a question is ''; expected a keyword" in refusal("needlebench", tmp_path / "needles")


def test_csv_files_as_people_have_them(tmp_path: Path) -> None:
    """Marks and line ends of other systems, other separators within a text, and what a Mac's archive adds."""
    test = tmp_path / "test"
    test.mkdir()
    row = "one\u2028two\x0b\x85?,a,b,c\x1c,d,B\r\n"
    (test / "x_test.csv").write_text("\ufeff" + row + "\r\n  \r\n" + row, encoding="utf-8", newline="")
    (test / "._x_test.csv").write_bytes(b"\0\5\x16\7\xff")
    found = questions("mmlu", test)
    assert [(one.subject, one.answer) for one in found] == [("x", "B")] * 2
    assert found[0].text.startswith("one\u2028two") and "C. c\x1c\n" in found[0].text
    (test / "x_test.csv").write_text(row + "\n\nq,a,b\n")
    assert "x_test.csv, row 4: has 3 columns" in refusal("mmlu", test)
    (test / "x_test.csv").write_text(row + "q" * 200_000 + ",a,b,c,d,A\n")
    assert len(questions("mmlu", test)[1].text) > 200_000
    (test / "x_test.csv").write_text(row + 'q,a,b,c,d,"A\n' + row)
    assert "x_test.csv" in refusal("mmlu", test)
    (test / "x.csv").write_text("Question,A,B,C,D,D,Answer\nq,a,b,c,d,e,A\n")
    assert "x.csv: there are two columns D" in refusal("cmmlu", test / "x.csv")


def test_texts_that_no_tokenizer_takes_are_mended(tmp_path: Path) -> None:
    (tmp_path / "dev.jsonl").write_text('{"question": "a\\ud800b", "passage": "p", "answer": true}\n')
    (question,) = questions("boolq", tmp_path)
    assert "Question: a?b?" in question.text


def test_hellaswag_cleans_its_texts(tmp_path: Path) -> None:
    found = questions("hellaswag", write_hellaswag(tmp_path))
    assert len(found) == 6 and len(found[0].choices) == 4
    assert all(choice.endswith(" end.") and "[" not in choice for choice in found[0].choices)


def test_gsm8k(tmp_path: Path) -> None:
    rows = [{"question": "How many?", "answer": "1,000 and <<2+3=5>> 234.\n#### 1,234"}]
    write_jsonl(tmp_path / "data/test.jsonl", rows)
    write_jsonl(tmp_path / "shots.jsonl", rows * 4)
    (question,) = questions("gsm8k", tmp_path / "data", fewshot_path=tmp_path / "shots.jsonl")
    assert question.answer == "1234" and len(question.shots) == 3
    assert question.shots[0].answer == "The answer is 1234."
    reasoned = questions(
        "gsm8k", tmp_path / "data", fewshot_path=tmp_path / "shots.jsonl", chain_of_thought=True
    )
    assert len(reasoned[0].shots) == 4 and reasoned[0].shots[0].answer.startswith("1,000 and")
    judge = benchmark("gsm8k").judge
    for text in ("so 12. The answer is $1,234.00.", "#### 1234", "7 + 1227 = 1234"):
        assert judge(question, text).correct, text
    for text in ("The answer is 123. No, 1234 is not", "none", "1234 The answer is 5"):
        assert not judge(question, text).correct, text
    write_jsonl(tmp_path / "data/test.jsonl", [{"question": "q", "answer": "5"}])
    assert "does not end with ####" in refusal("gsm8k", tmp_path / "data")


def test_bbh(tmp_path: Path) -> None:
    rows = [{"input": "Which?\nOptions:\n(A) x\n(B) y", "target": "(B)"}]
    (tmp_path / "bbh").mkdir()
    (tmp_path / "bbh/colours.json").write_text(json.dumps({"examples": rows}))
    (tmp_path / "cot-prompts").mkdir()
    (tmp_path / "cot-prompts/colours.txt").write_text(
        "a mark for machines\n-----\nSay which.\n\nQ: one\nA: Well. So the answer is (A).\n\n"
        "Q: two\nA: the answer is (B)."
    )
    (question,) = questions("bbh", tmp_path / "bbh")
    assert question.text == "Q: Which?\nOptions:\n(A) x\n(B) y\nA:" and not question.shots
    (reasoned,) = questions("bbh", tmp_path / "bbh", chain_of_thought=True)
    assert reasoned.instruction == "Say which." and len(reasoned.shots) == 2
    assert reasoned.shots[0].question == "Q: one\nA:" and reasoned.shots[1].answer == "the answer is (B)."
    judge = benchmark("bbh").judge
    for text in (" (B)", "(B) y", "I think. So the answer is (B).", "B"):
        assert judge(question, text).correct, text
    for text in ("(A)", "(A) or (B)", "the answer is (A). Not (B)"):
        assert not judge(question, text).correct, text
    (tmp_path / "bbh/colours.json").write_text("{}")
    assert "a list examples" in refusal("bbh", tmp_path / "bbh")


def test_agieval(tmp_path: Path) -> None:
    options = ["(A)x", "(B)y", "(C)z"]
    rows = [
        {"passage": "p", "question": "q?", "options": options, "label": "B", "answer": None},
        {"passage": None, "question": "q2?", "options": options, "label": "C", "answer": None},
    ]
    write_jsonl(tmp_path / "sat-math.jsonl", rows)
    write_jsonl(tmp_path / "math.jsonl", [{"question": "1+1", "options": None, "label": None, "answer": "2"}])
    several = {"question": "哪些", "options": options, "label": ["B", "A"]}
    write_jsonl(tmp_path / "jec-qa-ca.jsonl", [several, {**several, "label": "C"}])
    by_subject = {question.subject: question for question in questions("agieval", tmp_path)}
    assert by_subject["sat-math"].labels == ("A", "B", "C") and by_subject["math"].labels == ()
    chinese = by_subject["jec-qa-ca"]
    assert chinese.labels == () and chinese.text.endswith("答案：")
    other = {one.subject: one for one in questions("agieval", tmp_path, alternative_prompt=True)}
    assert other["sat-math"].text == "q2?\n(A)x\n(B)y\n(C)z\nThe answer is"
    assert other["jec-qa-ca"].text.endswith("(C)z\n答案是")
    judge = benchmark("agieval").judge
    assert judge(by_subject["math"], " 2\nbecause").correct and not judge(by_subject["math"], "12").correct
    assert judge(chinese, "C").correct and not judge(chinese, "AC").correct
    write_jsonl(tmp_path / "sat-math.jsonl", [{"question": "q", "options": options, "label": "(b)"}])
    assert {one.subject: one for one in questions("agieval", tmp_path)}["sat-math"].answer == "B"
    write_jsonl(tmp_path / "sat-math.jsonl", [{"question": "q", "options": options}])
    assert "question 0: has no label" in refusal("agieval", tmp_path)


def test_agieval_as_it_is_published(tmp_path: Path) -> None:
    """A question with a full stop among its letters, one without a letter, and a packed file."""
    options = ["(A)x", "(B)y", "(C)z"]
    labels = (["A", "C", "。"], [], ["B"])
    lines = [json.dumps({"question": "q", "options": options, "label": label}) + "\n" for label in labels]
    (tmp_path / "jec-qa-kd.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    notices: list[str] = []
    found = questions("agieval", tmp_path, notices=notices)
    assert [one.answer for one in found] == ["AC", "", "B"] and found[0].subject == "jec-qa-kd"
    assert "names no right option of question 1" in notices[0]
    judge = benchmark("agieval").judge
    assert (
        judge(found[0], "A、C").correct
        and not judge(found[1], "").correct
        and not judge(found[1], "A").correct
    )
    (tmp_path / "jec-qa-kd.jsonl").write_text(lines[2])
    assert [one.answer for one in questions("agieval", tmp_path)] == ["B"]


def test_human_eval_runs_what_was_written(tmp_path: Path) -> None:
    row = {
        "task_id": "made/0",
        "prompt": "from typing import Any\n\ndef helped(x):\n    return x + x\n\n"
        'def twice(x):\n    """Twice x."""\n',
        "entry_point": "twice",
        "test": "def check(candidate):\n    assert candidate(4) == 8\n",
    }
    write_jsonl(tmp_path / "human.jsonl", [row])
    made = benchmark("human_eval")
    (question,) = made.questions(TaskSettings(path=tmp_path))
    assert made.num_beams == 4 and question.separator == ""
    assert made.judge(question, "    return 2 * x\n").correct
    assert made.judge(question, "Sure:\n```python\ndef twice(x):\n    return x + x\n```").correct
    assert made.judge(question, "```python\n    return helped(x)\n```").correct
    assert made.judge(question, "def twice(x: Any):\n    return helped(x)\n```\nAs asked.").correct
    assert made.judge(question, "```sh\nls\n```\n```\ndef twice(x):\n    return helped(x)\n```").correct
    assert not made.judge(question, "    return x\n").correct
    assert not made.judge(question, "    import os; os._exit(0)\n").correct
    greedy = benchmark("human_eval")
    greedy.questions(TaskSettings(path=tmp_path, greedy=True))
    assert greedy.num_beams == 1


def test_needles_lie_where_they_should(tmp_path: Path, judged_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(judged_model)
    needle = {
        "needle": "The key is maple.",
        "retrieval_question": "Which key?",
        "arg2": "Maple",
        "language": "English",
    }
    write_jsonl(tmp_path / "needles.jsonl", [needle, {**needle, "language": "Chinese"}])
    write_jsonl(tmp_path / "Essays.jsonl", [{"text": "River stone cloud. Green light under paper. " * 9}])
    write_jsonl(tmp_path / "zh_finance.jsonl", [{"text": "河流石头。" * 40}])
    common = {"tokenizer": tokenizer, "longest": 1024, "needle_depths": (0.0, 50.0, 100.0)}
    found = questions("needlebench", tmp_path, context_lengths=(300, 600), **common)
    assert [question.subject for question in found][::3] == ["300 tokens, depth 0%", "600 tokens, depth 0%"]
    for question, share in zip(found[3:], (0.0, 0.5, 1.0), strict=True):
        before, _, after = question.text.partition(needle["needle"])
        place = len(before) / (len(before) + len(after))
        assert abs(place - share) < 0.2
        assert share == 1.0 or before.rstrip().endswith((".", "it."))
        assert len(tokenizer(question.text)["input_ids"]) <= 600
    assert benchmark("needlebench").judge(found[0], "It is maple").correct
    assert (
        "问题："
        in questions("needlebench", tmp_path, language="zh", context_lengths=(300,), **common)[0].text
    )
    assert "--context-lengths 2000" in refusal("needlebench", tmp_path, context_lengths=(2000,), **common)


def test_several_needles_in_one_text(tmp_path: Path, judged_model: Path) -> None:
    from transformers import AutoTokenizer

    rows = [
        {
            "needle": f"The key of {place} is {word}.",
            "retrieval_question": f"Which key has {place}?",
            "arg1": place,
            "arg2": word,
            "language": "English",
        }
        for place, word in (
            ("Rome", "Maple"),
            ("Rome", "Oak"),
            ("Oslo", "Maple"),
            ("Oslo", "Ash"),
            ("Bern", "Elm"),
        )
    ]
    write_jsonl(tmp_path / "needles.jsonl", rows)
    write_jsonl(tmp_path / "Essays.jsonl", [{"text": "River stone cloud. Green light under paper. " * 9}])
    common = {"tokenizer": AutoTokenizer.from_pretrained(judged_model), "longest": 1500}
    common = {**common, "context_lengths": (900,), "needle_depths": (20.0, 50.0, 80.0)}
    (found,) = questions("needlebench", tmp_path, needle_task="retrieval", **common)
    assert found.subject == "900 tokens, 3 needles" and found.answer == "Maple; Ash; Elm"
    places = [found.text.index(rows[number]["needle"]) / len(found.text) for number in (0, 3, 4)]
    assert all(abs(place - share) < 0.15 for place, share in zip(places, (0.2, 0.5, 0.8), strict=True))
    assert "1. Which key has Rome?\n2. Which key has Oslo?\n3. Which key has Bern?" in found.text
    judge = benchmark("needlebench").judge
    assert judge(found, "ELM and maple").correct == pytest.approx(2 / 3)
    assert judge(found, "ash, elm, maple").correct == 1 and judge(found, "oak").correct == 0
    depths = {**common, "needle_depths": (1.0, 2.0, 3.0, 4.0)}
    message = "3 different needles whose language is English, but --needle-depths names 4 places"
    assert message in refusal("needlebench", tmp_path, needle_task="retrieval", **depths)

    kin = [{"derivations": ["Ann is kin of Bo.", "Bo is kin of Cy."], "derivation_count": 2}]
    kin += [{"derivations": ["Di is Ed."], "derivation_count": 1}]
    kin = [{**one, "question": "Who is it?", "answer": "Cy King", "id": 1} for one in kin]
    (tmp_path / "multi_needle_reasoning_en.json").write_text(json.dumps(kin))
    found, *others = questions("needlebench", tmp_path, needle_task="reasoning", **common)
    assert found.subject == "900 tokens, depth 20%, 2 needles" and len(others) == 2
    first, second = (found.text.index(needle) / len(found.text) for needle in kin[0]["derivations"])
    assert abs(first - 0.2) < 0.1 and 0.02 < second - first < 0.2
    assert judge(found, "that is cy").correct == 0.5
    wrong = refusal("needlebench", tmp_path, needle_task="reasoning", num_needles=5, **common)
    assert wrong.startswith("--num-needles 5: ") and wrong.endswith("has those over 1, 2 needles")
    (tmp_path / "multi_needle_reasoning_en.json").write_text("[1]")
    assert "question 0: expected an object" in refusal(
        "needlebench", tmp_path, needle_task="reasoning", **common
    )


def test_shares_of_an_answer_have_a_standard_error() -> None:
    """That of a mean; for right and wrong alone the binomial one."""
    import statistics

    def tally(values: list[Any]) -> dict[str, Any]:
        common: dict[str, Any] = {
            "subject": "s",
            "index": 0,
            "prompt": "",
            "choices": [],
            "loglikelihoods": [],
        }
        rows = [Record(**common, prediction=None, answer=None, correct=value) for value in values]
        return Tally.of(rows).as_json()

    shares = [0.25, 1.0, 0.5, 0.0, 0.75]
    assert tally(shares)["stderr"] == pytest.approx(statistics.stdev(shares) / len(shares) ** 0.5)
    assert tally([True, False, True, True])["stderr"] == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
