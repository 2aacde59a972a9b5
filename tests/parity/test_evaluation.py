"""Scores of ``evaluation.py`` are those of transformers and PEFT, question by question, in every layout.

The reference computes each choice by a whole forward pass of its own. With lm_eval installed, its scores on
transformers with the merged model are compared too.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.benchmark_files import (
    LETTERS,
    SUBJECTS,
    letter_rows,
    write_boolq,
    write_hellaswag,
    write_jsonl,
    write_mmlu,
    write_model,
)
from tests.support.generation import evaluate_on_rank
from tests.support.pool import WorkerPool
from tests.support.reference import Reference

TOLERANCE = 2e-3
"""Of a log-likelihood of up to forty tokens in float32: sums of some 1e-5 a token, over prompts of 600 tokens."""


class Judged:
    """A model with an adapter, benchmarks, and what transformers and PEFT say to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model(folder / "model")
        reference = Reference(self.model)
        reference.add_adapter(rank=4, alpha=8)
        self.adapter = reference.save_adapter(folder / "adapter")
        self.paths = {
            "mmlu": write_mmlu(folder / "mmlu"),
            "mmlu_ppl": folder / "mmlu" / "test",
            "hellaswag": write_hellaswag(folder / "hellaswag"),
            "boolq": write_boolq(folder / "boolq"),
        }
        self._live: Any = None

    def live(self) -> tuple[Any, Any]:
        """transformers' model with the adapter merged, and its tokenizer."""
        if self._live is None:
            from peft import PeftModel
            from transformers import AutoModelForCausalLM, AutoTokenizer

            base = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
            merged = PeftModel.from_pretrained(base, self.adapter).merge_and_unload().eval()
            self._live = merged, AutoTokenizer.from_pretrained(self.model)
        return self._live

    def log_likelihood(self, context: str, continuation: str) -> float:
        model, tokenizer = self.live()
        before = tokenizer(context)["input_ids"]
        whole = tokenizer(context + continuation)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        return float(sum(logits[i - 1, whole[i]] for i in range(len(before), len(whole))))

    def words(self, task: str, output: Path, *others: str) -> list[str]:
        words = ["--load", str(self.model), "--lora-load", str(self.adapter), "--task", task]
        return [*words, "--task-data-path", str(self.paths[task]), "--output-dir", str(output), *others]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    return Judged(tmp_path_factory.mktemp("judged"))


def told(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    records = [
        json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return json.loads((folder / "results.json").read_text(encoding="utf-8")), records


LAYOUTS = {
    "one rank": (1, ()),
    "one rank, batch of 4": (1, ("--evaluation-batch-size", "4")),
    "tp": (2, ("--tensor-model-parallel-size", "2", "--evaluation-batch-size", "3")),
    "pp": (2, ("--pipeline-model-parallel-size", "2", "--evaluation-batch-size", "2")),
    "dp": (2, ("--evaluation-batch-size", "2")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_choices_are_scored_as_transformers_does(
    judged: Judged, workers: WorkerPool, tmp_path: Path, layout: str
) -> None:
    ranks, words = LAYOUTS[layout]
    tasks = ("mmlu", "hellaswag", "boolq")
    line = ["--load", str(judged.model), "--lora-load", str(judged.adapter), "--task", *tasks]
    line += ["--task-data-path", *(str(judged.paths[task]) for task in tasks)]
    line += ["--output-dir", str(tmp_path / "found"), *words]
    assert set(workers.run(ranks, evaluate_on_rank, line, str(tmp_path / "out"))) == {0}
    for task in tasks:
        results, records = told(tmp_path / "found" / task)
        labels = ("Yes", "No") if task == "boolq" else "0123" if task == "hellaswag" else LETTERS
        for record in records:
            expected = [judged.log_likelihood(record["prompt"], " " + choice) for choice in record["choices"]]
            assert record["loglikelihoods"] == pytest.approx(expected, abs=TOLERANCE), (task, record["index"])
            assert record["prediction"] == labels[expected.index(max(expected))]
            assert record["correct"] == (record["prediction"] == record["answer"])
        n, right = len(records), sum(record["correct"] for record in records)
        stderr = math.sqrt(right / n * (1 - right / n) / (n - 1))
        assert results["task"] == task
        assert results["total"] == {"accuracy": right / n, "stderr": pytest.approx(stderr), "n": n}
        assert sum(one["n"] for one in results["subjects"].values()) == n
    assert (tmp_path / "out.0").read_text(encoding="utf-8").count("std. error") == len(tasks)


def test_prompts_of_mmlu_are_the_published_form(judged: Judged, workers: WorkerPool, tmp_path: Path) -> None:
    words = judged.words("mmlu", tmp_path, "--num-fewshot", "2", "--max-eval-samples", "2")
    workers.run(1, evaluate_on_rank, words, str(tmp_path / "out"))
    results, records = told(tmp_path)
    assert list(results["subjects"]) == list(SUBJECTS) and len(records) == 4
    prompt = records[2]["prompt"]
    assert prompt.startswith(
        "The following are multiple choice questions (with answers) about world religions.\n\n"
    )
    assert prompt.count("\nAnswer:") == 3 and prompt.endswith("\nAnswer:")
    assert prompt.count("\n\n") == 3


def test_perplexity_orders_letters_as_their_likelihood_does(
    judged: Judged, workers: WorkerPool, tmp_path: Path
) -> None:
    for task in ("mmlu", "mmlu_ppl"):
        workers.run(1, evaluate_on_rank, judged.words(task, tmp_path / task), str(tmp_path / "out"))
    (_, plain), (_, by_perplexity) = told(tmp_path / "mmlu"), told(tmp_path / "mmlu_ppl")
    assert plain == by_perplexity


def test_conversations_are_asked_in_the_tokenizers_form(
    judged: Judged, workers: WorkerPool, tmp_path: Path
) -> None:
    words = judged.words(
        "mmlu", tmp_path, "--hf-chat-template", "--num-fewshot", "2", "--max-eval-samples", "2"
    )
    workers.run(1, evaluate_on_rank, words, str(tmp_path / "out"))
    model, tokenizer = judged.live()
    for record in told(tmp_path)[1]:
        assert record["prompt"].count("<|im_start|>user") == 3
        assert record["prompt"].endswith("<|im_start|>assistant\n")
        context = tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]
        letters = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in LETTERS]
        with torch.inference_mode():
            logits = model(torch.tensor([context])).logits[0, -1].double().log_softmax(-1)
        assert record["loglikelihoods"] == pytest.approx(logits[letters].tolist(), abs=TOLERANCE)


def test_prompts_that_are_too_long_lose_their_beginning(
    judged: Judged, workers: WorkerPool, tmp_path: Path
) -> None:
    words = judged.words("mmlu", tmp_path / "cut", "--seq-length", "80", "--evaluation-batch-size", "3")
    workers.run(1, evaluate_on_rank, words, str(tmp_path / "out"))
    workers.run(1, evaluate_on_rank, judged.words("mmlu", tmp_path / "whole"), str(tmp_path / "out"))
    model, tokenizer = judged.live()
    for record, whole in zip(told(tmp_path / "cut")[1], told(tmp_path / "whole")[1], strict=True):
        before = tokenizer(whole["prompt"])["input_ids"]
        added = [tokenizer(f"{whole['prompt']} {letter}")["input_ids"][len(before) :] for letter in LETTERS]
        # The last token of a choice is not read.
        context = before[-(80 + 1 - max(map(len, added))) :]
        assert record["prompt"] == tokenizer.decode(context)
        expected = []
        for tokens in added:
            with torch.inference_mode():
                logits = model(torch.tensor([[*context, *tokens]])).logits[0].double().log_softmax(-1)
            after = logits[len(context) - 1 : -1]
            expected.append(float(sum(row[token] for row, token in zip(after, tokens, strict=True))))
        assert record["loglikelihoods"] == pytest.approx(expected, abs=TOLERANCE)


@pytest.fixture(scope="module")
def harness_tasks(judged: Judged) -> dict[str, Path]:
    """Task files of lm_eval over the same questions, and others over made texts."""
    pytest.importorskip("lm_eval")
    folder = judged.folder / "tasks"
    import csv
    import random

    for subject in SUBJECTS:
        for part, name in (("test", "test"), ("dev", "dev")):
            with (judged.folder / "mmlu" / part / f"{subject}_{name}.csv").open(newline="") as file:
                rows = [
                    {"question": row[0], "choices": row[1:5], "answer": LETTERS.index(row[5])}
                    for row in csv.reader(file)
                ]
            write_jsonl(folder / f"{subject}_{name}.jsonl", rows)
        task = {
            "task": f"made_{subject}",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {name: str(folder / f"{subject}_{name}.jsonl") for name in ("test", "dev")}
            },
            "test_split": "test",
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": 5,
            "output_type": "multiple_choice",
            "description": "The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n",
            "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
            "D. {{choices[3]}}\nAnswer:",
            "doc_to_choice": ["A", "B", "C", "D"],
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
        }
        (folder / f"{subject}.yaml").write_text(yaml.safe_dump(task))
    draw = random.Random(9)
    texts = [{"text": " ".join(row[0] for row in letter_rows(draw, 9)), "answer": "stone"} for _ in range(3)]
    write_jsonl(folder / "texts.jsonl", texts)
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}},
        "test_split": "test",
    }
    rolling = {
        **common,
        "task": "made_rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    generated = {
        **common,
        "task": "made_generated",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["A", "pɡ"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (rolling, generated):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return {"folder": folder}


def harness_reference(
    judged: Judged, folder: Path, tasks: list[str], longest: int, **keywords: Any
) -> dict[str, list[Any]]:
    """lm_eval's samples on transformers with the merged model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = judged.live()
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, max_length=longest, batch_size=1),
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        **keywords,
    )
    assert found is not None
    return dict(found["samples"])


def test_scores_are_lm_evals(
    judged: Judged, harness_tasks: dict[str, Path], workers: WorkerPool, tmp_path: Path
) -> None:
    """Its tasks through our model under TP, and our own mmlu over the same questions."""
    folder, tasks = harness_tasks["folder"], [f"made_{subject}" for subject in SUBJECTS]
    names = [*tasks, "made_rolling", "made_generated"]
    line = ["--load", str(judged.model), "--lora-load", str(judged.adapter), "--task", *names]
    line += ["--task-data-path", str(folder), "--output-dir", str(tmp_path / "theirs")]
    line += ["--seq-length", "700", "--evaluation-batch-size", "2", "--tensor-model-parallel-size", "2"]
    workers.run(2, evaluate_on_rank, line, str(tmp_path / "out"))
    workers.run(1, evaluate_on_rank, judged.words("mmlu", tmp_path / "ours"), str(tmp_path / "out"))
    expected = harness_reference(judged, folder, names, 700)
    ours = told(tmp_path / "ours")[1]
    for task, subject in zip(tasks, SUBJECTS, strict=True):
        own = [record for record in ours if record["subject"] == subject]
        results, theirs = told(tmp_path / "theirs" / task)
        right = []
        for sample, ours_record, through_lm in zip(expected[task], own, theirs, strict=True):
            values = [float(response[0]) for response in sample["filtered_resps"]]
            assert ours_record["prompt"] == sample["arguments"][0][0]
            assert ours_record["loglikelihoods"] == pytest.approx(values, abs=TOLERANCE)
            assert through_lm["loglikelihoods"] == pytest.approx(values, abs=TOLERANCE)
            assert ours_record["correct"] == through_lm["correct"] == bool(sample["acc"])
            right.append(sample["acc"])
        assert results["total"]["accuracy"] == pytest.approx(sum(right) / len(right))
    generated = told(tmp_path / "theirs" / "made_generated")[1]
    assert [record["prediction"] for record in generated] == [
        sample["filtered_resps"][0] for sample in expected["made_generated"]
    ]
    harness = json.loads((tmp_path / "theirs" / "made_rolling" / "lm_eval.json").read_text())
    perplexity = harness["results"]["made_rolling"]["word_perplexity,none"]
    texts = [sample["filtered_resps"][0] for sample in expected["made_rolling"]]
    words = [len(sample["doc"]["text"].split()) for sample in expected["made_rolling"]]
    assert math.log(perplexity) == pytest.approx(-sum(texts) / sum(words), abs=1e-4)


@pytest.mark.parametrize("multiturn", ["true", "false"])
def test_conversations_are_lm_evals(
    judged: Judged, harness_tasks: dict[str, Path], workers: WorkerPool, tmp_path: Path, multiturn: str
) -> None:
    """By the tokenizer's template its scores; by ours, which says the same here, those of what follows it."""
    folder, names = harness_tasks["folder"], [f"made_{SUBJECTS[0]}", "made_generated"]
    line = ["--load", str(judged.model), "--lora-load", str(judged.adapter), "--task", *names]
    line += ["--task-data-path", str(folder), "--evaluation-batch-size", "2"]
    line += ["--tensor-model-parallel-size", "2", "--fewshot-as-multiturn", multiturn]
    for template in (["--hf-chat-template"], ["--prompt-type", "chatml"]):
        output = ["--output-dir", str(tmp_path / template[-1])]
        workers.run(2, evaluate_on_rank, [*line, *template, *output], str(tmp_path / "out"))
    expected = harness_reference(
        judged, folder, names, 1024, apply_chat_template=True, fewshot_as_multiturn=multiturn == "true"
    )
    model, tokenizer = judged.live()
    by_theirs = told(tmp_path / "--hf-chat-template" / names[0])[1]
    by_ours = told(tmp_path / "chatml" / names[0])[1]
    for sample, theirs, ours in zip(expected[names[0]], by_theirs, by_ours, strict=True):
        text = sample["arguments"][0][0]
        assert theirs["prompt"] == ours["prompt"] == text
        assert text.count("<|im_start|>user") == (6 if multiturn == "true" else 1)
        values = [float(response[0]) for response in sample["filtered_resps"]]
        assert theirs["loglikelihoods"] == pytest.approx(values, abs=TOLERANCE)
        context = tokenizer(text, add_special_tokens=False)["input_ids"]
        letters = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in LETTERS]
        with torch.inference_mode():
            logits = model(torch.tensor([context])).logits[0, -1].double().log_softmax(-1)
        assert ours["loglikelihoods"] == pytest.approx(logits[letters].tolist(), abs=TOLERANCE)
    generated = [sample["filtered_resps"][0] for sample in expected["made_generated"]]
    theirs, ours = (
        [record["prediction"] for record in told(tmp_path / template / "made_generated")[1]]
        for template in ("--hf-chat-template", "chatml")
    )
    assert theirs == generated
    # Ours also ends an answer where its turn ends, which lm_eval knows from the task alone.
    assert all(text.startswith(own) for text, own in zip(generated, ours, strict=True)) and any(ours)
