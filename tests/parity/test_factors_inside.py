"""A Megatron checkpoint with LoRA factors beside its base is judged and asked as PEFT's merged model is.

So MindSpeed-LLM saves a LoRA run without ``--lora-ckpt-filter``; the published evaluation of MiniCPM names such a
checkpoint by ``--load`` alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from mindspeed_lora.config.commands import parse
from mindspeed_lora.errors import Refused
from mindspeed_lora.inference.model_plan import plan_model
from tests.support.benchmark_files import LETTERS, write_mmlu, write_model
from tests.support.generation import evaluate_on_rank, infer_on_rank
from tests.support.megatron_files import Layout
from tests.support.pool import WorkerPool
from tests.support.wrapped_adapters import Trained, wrapped
from tests.unit.checkpoint.conftest import HfModel

TOLERANCE = 2e-3
"""Of a log-likelihood in float32 over prompts of some hundred tokens, as in ``test_evaluation.py``."""


class Saved:
    """A trained model, its checkpoint with base and factors, and PEFT's model."""

    def __init__(self, folder: Path) -> None:
        self.hf = write_model(folder / "model")
        self.trained = Trained(HfModel("llama", self.hf))
        self.both = self.trained.write(folder / "both", Layout(tp=2, pp=2), with_base=True, change=wrapped)
        self.alone = self.trained.write(folder / "alone", Layout())
        self.tokenizer = AutoTokenizer.from_pretrained(self.hf)

    def log_likelihood(self, context: str, continuation: str) -> float:
        """By PEFT's model."""
        before, whole = (self.tokenizer(text)["input_ids"] for text in (context, context + continuation))
        with torch.inference_mode():
            logits = self.trained.peft(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        return float(sum(logits[i - 1, whole[i]] for i in range(len(before), len(whole))))

    def words(self, *words: object, load: Path | None = None) -> list[str]:
        tokenizer = ["--tokenizer-name-or-path", str(self.hf)]
        return ["--load", str(load or self.both), *tokenizer, *map(str, words)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("ranks", "layout"), [(1, ()), (2, ("--tensor-model-parallel-size", "2"))])
def test_it_is_judged_with_its_adapter(
    saved: Saved, workers: WorkerPool, tmp_path: Path, ranks: int, layout: tuple[str, ...]
) -> None:
    """By the flags of the published script, which repeat rank, alpha and targets."""
    path = write_mmlu(tmp_path / "mmlu", questions=3, shots=1)
    flags = ["--lora-r", 4, "--lora-alpha", 12, "--lora-fusion", "--max-new-tokens", 1]
    flags += ["--lora-target-modules", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    line = saved.words("--task", "mmlu", "--task-data-path", path, "--output-dir", tmp_path, *flags, *layout)
    workers.run(ranks, evaluate_on_rank, line, str(tmp_path / "out"))
    for record in rows(tmp_path / "records.jsonl"):
        expected = [saved.log_likelihood(record["prompt"], f" {letter}") for letter in LETTERS]
        assert record["loglikelihoods"] == pytest.approx(expected, abs=TOLERANCE)


def test_it_answers_with_its_adapter(saved: Saved, workers: WorkerPool, tmp_path: Path) -> None:
    """Without any LoRA flag; not as its base alone does."""
    told: dict[str, list[Any]] = {}
    for name, load in (("both", saved.both), ("base", saved.hf)):
        words = ["--prompt", "how are you?", "Name", "--max-new-tokens", 12, "--task", "greedy"]
        line = saved.words(*words, "--output-file", tmp_path / name, load=load)
        workers.run(2, infer_on_rank, [*line, "--pipeline-model-parallel-size", "2"], str(tmp_path / "out"))
        told[name] = [row["token_ids"] for row in rows(tmp_path / name)]
    expected = []
    for prompt in ("how are you?", "Name"):
        given = saved.tokenizer(prompt, return_tensors="pt")
        answer = saved.trained.peft.generate(**given, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        expected.append(answer[given["input_ids"].size(1) :].tolist())
    assert told["both"] == expected != told["base"]


def test_what_is_applied_is_told(saved: Saved, tmp_path: Path) -> None:
    plan = plan_model(parse("inference", saved.words(), {}))
    assert plan.adapter is not None and plan.adapter.spec.parts
    assert any("holds LoRA factors beside the base; they are applied" in notice for notice in plan.notices)
    plan = plan_model(parse("inference", saved.words("--lora-load", saved.alone), {}))
    assert any("are left out; those of --lora-load are applied" in notice for notice in plan.notices)
    same = plan_model(parse("inference", saved.words("--lora-load", saved.both), {}))
    assert not any("LoRA factors" in notice for notice in same.notices)
    with pytest.raises(Refused, match="holds an adapter only; give it to --lora-load"):
        plan_model(parse("evaluation", saved.words("--task", "x", load=saved.alone), {}))
    with pytest.raises(Refused, match="given without --lora-load, and --load .* holds no LoRA factors"):
        plan_model(parse("inference", saved.words("--lora-r", 4, load=saved.hf), {}))
    with pytest.raises(Refused, match="--lora-r 8"):
        plan_model(parse("inference", saved.words("--lora-r", 8), {}))
