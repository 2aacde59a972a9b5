"""``inference.py --qlora``: the answers of transformers over the model that bitsandbytes quantised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.support.generation import infer_on_rank, transformers_greedy
from tests.support.pool import WorkerPool
from tests.support.quantized import Quant
from tests.support.reference import Reference

NESTED = Quant(double=True)
PROMPTS = ("how are you?", "Name three fruits")


@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("tp", [1, 2])
def test_answers_are_those_of_the_quantised_model(
    model_folder: Path, tmp_path: Path, workers: WorkerPool, tp: int, with_adapter: bool
) -> None:
    adapter = None
    if with_adapter:
        reference = Reference(model_folder, quant=NESTED)
        reference.add_adapter(rank=4, alpha=16)
        adapter = str(reference.save_adapter(tmp_path / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    expected = transformers_greedy(str(model_folder), prompts, 12, adapter, NESTED)
    output = tmp_path / "answers.jsonl"
    words = ["--load", str(model_folder), *NESTED.flags, "--prompt", *PROMPTS, "--output-file", str(output)]
    words += ["--max-new-tokens", "12", "--tensor-model-parallel-size", str(tp)]
    words += ["--lora-load", adapter] if adapter is not None else []
    assert set(workers.run(tp, infer_on_rank, words, str(tmp_path / "out"))) == {0}
    found = [json.loads(line)["token_ids"] for line in output.read_text(encoding="utf-8").splitlines()]
    assert found == expected
    plain = transformers_greedy(str(model_folder), prompts, 12, adapter)
    assert found != plain, "the model answers alike without quantisation: this test shows nothing"
