"""The scripts of the other families with experts, at toy sizes, from a Hugging Face folder to answers.

Tuned at EP 2, cut and put together, merged both ways, exported and answered. The command lines are the scripts' own,
run on ranks of the pool instead of by torchrun.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mindspeed_lora.checkpoint.conversion.convert import convert
from mindspeed_lora.config.commands import parse
from tests.support.generation import infer_on_rank, transformers_greedy
from tests.support.models import make_model
from tests.support.pool import WorkerPool
from tests.support.rows import random_rows, write_rows
from tests.support.training import train
from tests.unit.data.made_tokenizers import make_tokenizer

PROMPTS = ("how are you?", "Name three fruits")
STEPS = 6
SMALL = {
    **{"TP": "1", "PP": "1", "EP": "2", "NNODES": "1", "BF16": "0", "DISTRIBUTED_BACKEND": "gloo"},
    **{"SEQ_LENGTH": "48", "MICRO_BATCH_SIZE": "1", "GLOBAL_BATCH_SIZE": "4", "TRAIN_ITERS": f"{STEPS}"},
    **{"LR": "1e-2", "MIN_LR": "1e-3", "LR_WARMUP_ITERS": "", "SPEC": "", "PROMPT_TYPE": ""},
    **{"LORA_R": "4", "LORA_ALPHA": "8", "NO_PAD_TO_SEQ_LENGTHS": "1", "TOKENIZER_NOT_USE_FAST": "0"},
    **{"MODEL_TYPE_HF": ""},
}


@dataclass(frozen=True)
class Family:
    """The names of a family's scripts, and of its toy."""

    model: str
    tune: str
    generate: str
    merge: str = "mcore2hf_lora"


FAMILIES = {
    "qwen3_moe": Family("qwen3-moe", "qwen3_30b_a3b_4K_lora_ptd", "qwen3_30b_a3b_ptd"),
    "qwen2_moe": Family("qwen2-moe", "qwen2_57b_a14b_4k_lora", "qwen2_57b_a14b_ptd"),
    "deepseek3": Family(
        "deepseek-v3-moe", "deepseek3_671b_4k_lora_ptd", "deepseek3_671b_4k_lora_ptd", "merge_lora2hf"
    ),
}


def left_out(family: str) -> dict[str, str]:
    """The variables by which the scripts tell the published model: a toy's are as its checkpoint says."""
    folder = Path(__file__).parents[3] / "examples" / "mcore" / family
    rows = [line.split() for line in (folder / "model.sh").read_text().splitlines()]
    kept = ("MOE_TOKEN_DISPATCHER_TYPE", "CP_TYPE")
    names = [
        row[1] if row[0] == "own" else row[2]
        for row in rows
        if row[:1] and row[0] in ("own", "flag", "switch")
    ]
    return {name: "" for name in (*names, "NUM_LAYER_LIST") if name not in kept}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@dataclass
class Job:
    """Runs a family's scripts in a folder of its own."""

    name: str
    family: Family
    folder: Path
    arguments: Callable[..., list[str]]
    workers: WorkerPool

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def words(self, script: str, **variables: str) -> list[str]:
        told = self.arguments(f"{self.name}/{script}.sh", **left_out(self.name) | SMALL | variables)
        return told[next(place for place, word in enumerate(told) if word.endswith(".py")) + 1 :]

    def convert(self, what: str, **variables: str) -> None:
        convert(parse("convert", self.words(f"ckpt_convert_{self.name}_{what}", **variables)))


@pytest.fixture(scope="module", params=FAMILIES)
def job(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    workers: WorkerPool,
    script_arguments: Callable[..., list[str]],
) -> Iterator[Job]:
    """The whole chain of a family, once."""
    name = request.param
    job = Job(name, FAMILIES[name], tmp_path_factory.mktemp(name), script_arguments, workers)
    tokenizer = make_tokenizer("gpt2")
    tokenizer.save_pretrained(make_model(job.family.model, job.folder / "hf", vocab_size=len(tokenizer)))
    write_rows(job.folder / "rows", random_rows(4, len(tokenizer)))
    job.convert("hf2mcore", HF_MODEL_PATH=job.path("hf"), CKPT_SAVE_DIR=job.path("mg"))
    job.convert("mcore2hf", CKPT_LOAD_DIR=job.path("mg"), CKPT_SAVE_DIR=job.path("back"))
    run = job.words(
        f"tune_{job.family.tune}",
        CKPT_LOAD_DIR=job.path("mg"),
        CKPT_SAVE_DIR=job.path("run"),
        DATA_PATH=job.path("rows"),
        TOKENIZER_PATH="",
    )
    assert {"--moe-grouped-gemm", "--moe-alltoall-overlap-comm", "--lora-fusion"} <= {*run}
    assert workers.run(2, train, run) == [0, 0]
    job.convert("lora2hf", CKPT_LOAD_DIR=job.path("run"), CKPT_SAVE_DIR=job.path("peft"))
    base = {"CKPT_LOAD_DIR": job.path("mg"), "LORA_LOAD": job.path("run")}
    job.convert(job.family.merge, **base, CKPT_SAVE_DIR=job.path("merged"))
    job.convert("mg2mg_lora", **base, CKPT_SAVE_DIR=job.path("merged-mg"), EP="4")
    job.convert("mcore2hf", CKPT_LOAD_DIR=job.path("merged-mg"), CKPT_SAVE_DIR=job.path("merged-back"))
    yield job


def test_training_lowers_the_loss(job: Job) -> None:
    lines = (job.folder / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["lm_loss"] for line in lines]
    assert len(losses) == STEPS and losses[-1] < losses[0]


def test_there_and_back_is_bit_identical(job: Job) -> None:
    assert same(tensors(job.folder / "hf"), tensors(job.folder / "back" / "mg2hf"))


def test_both_ways_of_merging_give_the_same_bits(job: Job) -> None:
    merged, base = tensors(job.folder / "merged" / "mg2hf"), tensors(job.folder / "hf")
    assert same(merged, tensors(job.folder / "merged-back" / "mg2hf"))
    assert merged.keys() == base.keys()
    assert any("experts" in name and not torch.equal(merged[name], base[name]) for name in base)


def test_the_adapter_is_what_peft_makes_of_the_merged_model(job: Job) -> None:
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(job.folder / "hf", dtype=torch.float32)
    tokens = torch.arange(3, 43).unsqueeze(0)
    with torch.inference_mode():
        before = base.eval()(tokens).logits
        tuned = PeftModel.from_pretrained(base, job.path("peft/mg2hf")).eval()
        merged = AutoModelForCausalLM.from_pretrained(
            job.folder / "merged" / "mg2hf", dtype=torch.float32
        ).eval()
        expected, found = merged(tokens).logits, tuned(tokens).logits
    assert (expected - before).abs().max() > 0.01
    # Products of rank 4 in float32, added before or after the base's, of logits of size 10.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_answers_are_those_of_peft(job: Job, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(job.path("hf"))
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    expected = transformers_greedy(job.path("hf"), prompts, 12, job.path("peft/mg2hf"))
    (tmp_path / "prompts").write_text("\n".join(PROMPTS), encoding="utf-8")
    words = job.words(
        f"generate_{job.family.generate}",
        CKPT_LOAD_DIR=job.path("mg"),
        LORA_LOAD=job.path("run"),
        TOKENIZER_PATH=job.path("hf"),
        TASK="greedy",
        MAX_NEW_TOKENS="12",
        PROMPT_FILE=str(tmp_path / "prompts"),
        OUTPUT_FILE=str(tmp_path / "answers"),
    )
    assert job.workers.run(2, infer_on_rank, words, str(tmp_path / "out")) == [0, 0]
    rows: list[Any] = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]
    assert [row["token_ids"] for row in rows] == expected
