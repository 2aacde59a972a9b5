"""``evaluation.py`` as people run it: generated answers, experts, refusals, the published script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mindspeed_lora.config.commands import parse
from mindspeed_lora.errors import Failed, Refused
from mindspeed_lora.evaluation.engine import Engine, Generation
from mindspeed_lora.evaluation.plan import BenchmarkPlan, plan_evaluation
from mindspeed_lora.evaluation.run import BenchmarkRun
from mindspeed_lora.inference.generator import Answer, Request
from mindspeed_lora.inference.sampling import TokenChoice
from mindspeed_lora.inference.scoring import ScoreRequest
from tests.support.benchmark_files import SUBJECTS, write_boolq, write_hellaswag, write_jsonl, write_mmlu
from tests.support.generation import evaluate_on_rank
from tests.support.pool import WorkerPool

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "examples/mcore/llama2/evaluate_llama2_7B_lora_mmlu_ptd.sh"


def told(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    records = [
        json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return json.loads((folder / "results.json").read_text(encoding="utf-8")), records


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mmlu(tmp_path_factory.mktemp("mmlu"), questions=3)


def test_generated_answers_are_transformers_in_every_layout(
    judged_model: Path, workers: WorkerPool, tmp_path: Path
) -> None:
    rows = [{"question": f"How much is {i} and {i}?", "answer": f"Add.\n#### {2 * i}"} for i in range(5)]
    write_jsonl(tmp_path / "data/test.jsonl", rows)
    line = ["--load", str(judged_model), "--task", "gsm8k", "--task-data-path", str(tmp_path / "data")]
    line += ["--max-new-tokens", "9"]
    model = AutoModelForCausalLM.from_pretrained(judged_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(judged_model)
    for ranks, words in ((1, ["--evaluation-batch-size", "3"]), (2, ["--evaluation-batch-size", "2"])):
        out = tmp_path / f"{ranks}"
        workers.run(ranks, evaluate_on_rank, [*line, *words, "--output-dir", str(out)], str(tmp_path / "out"))
        results, records = told(out)
        assert results["total"]["n"] == 5 and [record["index"] for record in records] == list(range(5))
        for record in records:
            given = tokenizer(record["prompt"], return_tensors="pt")
            answer = model.generate(**given, max_new_tokens=9, do_sample=False, pad_token_id=0)[0]
            text = tokenizer.decode(answer[given["input_ids"].size(1) :], skip_special_tokens=True)
            assert record["text"] == text
            assert record["loglikelihoods"] == [] and record["choices"] == []


def test_letters_can_be_generated_as_older_numbers_have_them(
    judged_model: Path, mmlu: Path, workers: WorkerPool, tmp_path: Path
) -> None:
    line = [
        "--load",
        str(judged_model),
        "--task",
        "mmlu",
        "--task-data-path",
        str(mmlu),
        "--origin-postprocess",
    ]
    line += ["--max-new-tokens", "1", "--output-dir", str(tmp_path / "found")]
    assert workers.run(1, evaluate_on_rank, line, str(tmp_path / "out")) == [0]
    again = ["--config", str(tmp_path / "found/config.yaml"), "--output-dir", str(tmp_path / "again")]
    assert workers.run(1, evaluate_on_rank, again, str(tmp_path / "out")) == [0]
    assert told(tmp_path / "again") == told(tmp_path / "found")
    assert "are replaced" not in (tmp_path / "out.0").read_text()
    assert workers.run(1, evaluate_on_rank, again, str(tmp_path / "out")) == [0]
    assert f"the results in {tmp_path / 'again'} are replaced" in (tmp_path / "out.0").read_text()
    for record in told(tmp_path / "found")[1]:
        text = record["text"].strip()
        assert record["prediction"] == (text if text in tuple("ABCD") else None)


def test_replicas_that_share_experts_take_the_same_steps(workers: WorkerPool, tmp_path: Path) -> None:
    """Three questions and two replicas over cut experts: one has nothing to do in the last turn."""
    from tests.support.models import make_model

    model = make_model("qwen3-moe", tmp_path / "model", vocab_size=430, max_position_embeddings=1024)
    tokenizer_of(tmp_path / "tokenizer")
    path = write_mmlu(tmp_path / "mmlu", questions=3, shots=1)
    line = ["--load", str(model), "--tokenizer-name-or-path", str(tmp_path / "tokenizer"), "--task", "mmlu"]
    line += ["--task-data-path", str(path), "--broadcast"]
    workers.run(1, evaluate_on_rank, [*line, "--output-dir", str(tmp_path / "one")], str(tmp_path / "out"))
    line += ["--expert-model-parallel-size", "2", "--output-dir", str(tmp_path / "two")]
    workers.run(2, evaluate_on_rank, line, str(tmp_path / "out"))
    alone, shared = told(tmp_path / "one")[1], told(tmp_path / "two")[1]
    for one, other in zip(alone, shared, strict=True):
        assert other["loglikelihoods"] == pytest.approx(one["loglikelihoods"], abs=1e-3)


def test_programs_may_run_longer_than_ranks_wait(
    judged_model: Path, workers: WorkerPool, tmp_path: Path
) -> None:
    """What the toy model writes stands in a comment; the test itself takes longer than the other rank would wait."""
    row = {
        "task_id": "made/0",
        "prompt": "def one():\n    return 1\n# ",
        "entry_point": "one",
        "test": "def check(candidate):\n    import time\n    time.sleep(4)\n    assert candidate() == 1\n",
    }
    write_jsonl(tmp_path / "human/human.jsonl", [row])
    line = ["--load", str(judged_model), "--task", "human_eval", "--task-data-path", str(tmp_path / "human")]
    line += ["--allow-code-execution", "--max-new-tokens", "2", "--distributed-timeout-minutes", "0.05"]
    line += ["--tensor-model-parallel-size", "2", "--output-dir", str(tmp_path / "found")]
    assert workers.run(2, evaluate_on_rank, line, str(tmp_path / "out")) == [0, 0]
    results, (record,) = told(tmp_path / "found")
    assert record["correct"] and results["total"] == {"accuracy": 1.0, "stderr": 0.0, "n": 1}


def tokenizer_of(folder: Path) -> None:
    from tests.unit.data.made_tokenizers import make_tokenizer

    make_tokenizer("gpt2").save_pretrained(folder)


def test_unanswered_questions_give_a_submission(
    judged_model: Path, workers: WorkerPool, tmp_path: Path
) -> None:
    from tests.support.benchmark_files import write_csv

    header = ["id", "question", *"ABCD"]
    write_csv(tmp_path / "ceval/test/law_test.csv", [header, ["7", "q", *"abcd"], ["9", "r", *"abcd"]])
    line = ["--load", str(judged_model), "--task", "ceval", "--task-data-path", str(tmp_path / "ceval/test")]
    workers.run(1, evaluate_on_rank, [*line, "--output-dir", str(tmp_path / "found")], str(tmp_path / "out"))
    results, records = told(tmp_path / "found")
    assert results["total"] == {"accuracy": None, "stderr": None, "n": 0}
    submission = json.loads((tmp_path / "found/submission.json").read_text())
    assert submission == {"law": {"7": records[0]["prediction"], "9": records[1]["prediction"]}}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task mmlu", "--task-data-path is missing"),
        ("--task mmul", "--task mmul: "),
        ("", "--task is missing"),
        ("--task mmlu boolq --task-data-path x", "names 1 path for the 2 benchmarks"),
        ("--task mmlu --task-data-path nowhere", "--task-data-path nowhere: is not there"),
        ("--task human_eval --task-data-path x", "give --allow-code-execution"),
        ("--task mmlu mmlu --task-data-path {mmlu} {mmlu} --output-dir x", "--task names mmlu twice"),
        ("--task mmlu --task-data-path x --no-chat-template --hf-chat-template", "--no-chat-template and"),
        ("--task mmlu --task-data-path {mmlu} --instruction-template x", "has no {question} in it"),
        ("--task mmlu --task-data-path {mmlu} --num-fewshot 9", "--num-fewshot 9: "),
        ("--task mmlu --task-data-path {mmlu} --seq-length 0", "--seq-length 0: expected"),
        ("--task mmlu --task-data-path {mmlu} --output-dir {mmlu}/world_religions_test.csv", "is a file"),
        ("--task mmlu --task-data-path {mmlu} --choice-score loud", "--choice-score loud: expected one of"),
        ("--task mmlu --task-data-path {mmlu} --lora-r 8", "without --lora-load"),
        (
            "--task mmlu --task-data-path {mmlu} --origin-postprocess --max-new-tokens 1024",
            "mmlu generates 1024",
        ),
    ],
)
def test_impossible_jobs_are_refused(judged_model: Path, mmlu: Path, words: str, message: str) -> None:
    line = [word.replace("{mmlu}", str(mmlu)) for word in words.split()]
    with pytest.raises(Refused) as error:
        plan_evaluation(parse("evaluation", ["--load", str(judged_model), *line], {}))
    assert message in str(error.value)


def test_flags_without_effect_are_told_once_or_refused(
    judged_model: Path, mmlu: Path, tmp_path: Path
) -> None:
    boolq = write_boolq(tmp_path / "boolq")
    line = ["--load", str(judged_model), "--task", "mmlu", "boolq", "--task-data-path", str(mmlu), str(boolq)]
    plain = plan_evaluation(parse("evaluation", [*line, "--max-new-tokens", "1"], {}))
    assert not [notice for notice in plain.notices if notice.startswith("no effect")]
    line += ["--chain-of-thought", "--greedy", "--eval-language", "en", "--alternative-prompt"]
    (told,) = (one for one in plan_evaluation(parse("evaluation", line, {})).notices if "no effect" in one)
    assert told == (
        "no effect on mmlu: --chain-of-thought, --greedy; "
        "on boolq: --eval-language, --chain-of-thought, --greedy"
    )
    hellaswag = write_hellaswag(tmp_path / "hellaswag")
    line = ["--load", str(judged_model), "--task", "hellaswag", "--task-data-path", str(hellaswag)]
    plan_evaluation(parse("evaluation", [*line, "--num-fewshot", "0"], {}))
    plan = plan_evaluation(parse("evaluation", [*line, "--origin-postprocess"], {}))
    assert "no effect on hellaswag: --origin-postprocess" in plan.notices
    (task,) = plan.tasks
    assert isinstance(task, BenchmarkPlan) and not task.benchmark.generates(task.questions[0], True)
    with pytest.raises(Refused, match="hellaswag is asked without examples; leave out --num-fewshot"):
        plan_evaluation(parse("evaluation", [*line, "--num-fewshot", "5"], {}))


def test_answers_of_one_token_are_told_where_texts_are_judged(
    judged_model: Path, mmlu: Path, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "gsm8k/a.jsonl", [{"question": "How many?", "answer": "#### 5"}])
    line = ["--load", str(judged_model), "--task", "mmlu", "gsm8k"]
    line += ["--task-data-path", str(mmlu), str(tmp_path / "gsm8k")]
    for words, told in ((["--max-new-tokens", "1"], 1), (["--max-new-tokens", "64"], 0), ([], 0)):
        plan = plan_evaluation(parse("evaluation", [*line, *words], {}))
        sentence = (
            "gsm8k writes its answers: --max-new-tokens 1 cuts them off; left out, they have 256 tokens"
        )
        assert sum("writes its answers" in notice for notice in plan.notices) == told
        assert plan.notices.count(sentence) == told


class _Recorded:
    """An engine that writes the same answer to everything and keeps its orders."""

    def __init__(self) -> None:
        self.orders: list[Generation] = []

    def score(self, requests: Sequence[object]) -> list[Any]:
        assert not requests
        return []

    def generate(self, order: Generation) -> list[Answer]:
        self.orders.append(order)
        return [Answer(request) for request in order.requests]

    def text(self, answer: Answer, stop_words: Sequence[str]) -> str:
        assert tuple(stop_words) == self.orders[-1].stop_words
        return "Let me see.\n\nSo the answer is x."


def test_in_a_conversation_the_model_ends_its_turn(judged_model: Path, tmp_path: Path) -> None:
    """A chat model's reasoning has paragraphs; words that end a continuation of plain text would cut them off."""
    (tmp_path / "bbh").mkdir()
    (tmp_path / "bbh/a.json").write_text(json.dumps({"examples": [{"input": "q", "target": "x"}]}))
    line = ["--load", str(judged_model), "--task", "bbh", "--task-data-path", str(tmp_path / "bbh")]
    for words, stops in (([], ("\nQ:", "\n\n")), (["--hf-chat-template"], ())):
        plan, engine = plan_evaluation(parse("evaluation", [*line, *words], {})), _Recorded()
        (task,) = plan.tasks
        assert isinstance(task, BenchmarkPlan)
        ((_, (record,)),) = BenchmarkRun(cast(Engine, engine), plan, task).records()
        assert engine.orders[0].stop_words == stops and record.correct
        assert plan.ends


def test_a_token_that_the_model_does_not_have_is_no_number(judged_model: Path) -> None:
    """A later question has it. Ranks of a cut vocabulary would take it for zeros."""
    engine = Engine.__new__(Engine)
    engine.tokenizer = AutoTokenizer.from_pretrained(judged_model)
    engine._vocab_size = 10
    choice = TokenChoice(do_sample=False)
    for ask in (
        lambda: engine.score([ScoreRequest((1,), ((2,),)), ScoreRequest((1,), ((2,), (3, 10)))]),
        lambda: engine.score([ScoreRequest((10,), ((2,),))]),
        lambda: engine.generate(Generation((Request((1, 10), 4),), choice)),
    ):
        with pytest.raises(Failed, match="gives token 10, but the model has 10 words"):
            ask()


def test_a_template_of_ones_own(judged_model: Path, mmlu: Path) -> None:
    line = [
        "--load",
        str(judged_model),
        "--task",
        "mmlu",
        "--task-data-path",
        str(mmlu),
        "--num-fewshot",
        "1",
    ]
    line += ["--instruction-template", "About {subject}:\n{examples}\n###\n{question}"]
    plan = plan_evaluation(parse("evaluation", line, {}))
    prompt = plan.question_encoder.to_score(plan.tasks[0].questions[0]).prompt  # type: ignore[union-attr]
    assert prompt.startswith(f"About {SUBJECTS[0]}:\n") and prompt.count("\n###\n") == 1
    assert "multiple choice" not in prompt


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


def test_the_published_script_judges_a_toy(judged_model: Path, mmlu: Path, tmp_path: Path) -> None:
    """With its adapter, over two replicas."""
    from tests.support.reference import Reference

    reference = Reference(judged_model)
    reference.add_adapter(rank=4, alpha=8)
    adapter = reference.save_adapter(tmp_path / "adapter")
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    sizes = "NUM_LAYERS HIDDEN_SIZE FFN_HIDDEN_SIZE NUM_ATTENTION_HEADS VOCAB_SIZE NORM_EPSILON DISTRIBUTED_BACKEND"
    given = {
        "CKPT_LOAD_DIR": judged_model,
        "TOKENIZER_PATH": judged_model,
        "LORA_LOAD": adapter,
        "DATA_PATH": mmlu,
    }
    variables = {name: str(path) for name, path in given.items()}
    variables |= {
        "TORCHRUN": str(torchrun),
        "NPROC": "2",
        "FP16": "0",
        "LORA_R": "4",
        "LORA_ALPHA": "8",
        **dict.fromkeys(sizes.split(), ""),
    }
    variables |= {"OUTPUT_DIR": str(tmp_path / "found"), "SEQ_LENGTH": "1024", "TOKENIZER_NOT_USE_FAST": "0"}
    variables |= {"MASTER_PORT": str(10_000 + os.getpid() % 5000)}
    done = subprocess.run([SCRIPT], env=environment(**variables), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert told(tmp_path / "found")[0]["total"]["n"] == 6
    assert "mmlu, all" in done.stdout


def test_the_script_unchanged_is_accepted_in_a_dry_run(tmp_path: Path) -> None:
    """Placeholders and all, as eight ranks."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(
        f'#!/bin/sh\nwhile [ "${{1%.py}}" = "$1" ]; do shift; done\nexec "{sys.executable}" "$@"\n'
    )
    torchrun.chmod(0o755)
    variables = environment(TORCHRUN=str(torchrun))
    done = subprocess.run(
        [SCRIPT, "--dry-run", "--world-size", "8"],
        env=variables,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "questions are not there" in done.stdout and "world size" in done.stdout
    assert list(tmp_path.iterdir()) == [torchrun]
