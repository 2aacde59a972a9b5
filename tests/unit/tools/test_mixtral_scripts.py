"""Mixtral's scripts from a dense model to answers: up-cycle, cut, tune in two layouts, merge, export, generate.

The command lines are the scripts' own, run on ranks of the pool instead of by torchrun.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from upcycle import Recipe, upcycle

from mindspeed_lora.checkpoint.conversion.convert import convert
from mindspeed_lora.config.commands import parse
from tests.support.generation import infer_on_rank, transformers_greedy
from tests.support.models import make_model
from tests.support.pool import WorkerPool
from tests.support.rows import random_rows, write_rows
from tests.support.training import train
from tests.unit.data.made_tokenizers import make_tokenizer

PROMPTS = ("how are you?", "Name three fruits")
STEPS = 4
AS_THE_CHECKPOINT = (
    *(
        "NUM_LAYERS",
        "HIDDEN_SIZE",
        "FFN_HIDDEN_SIZE",
        "NUM_ATTENTION_HEADS",
        "NUM_QUERY_GROUPS",
        "VOCAB_SIZE",
    ),
    *("MAX_POSITION_EMBEDDINGS", "ROTARY_BASE", "NUM_EXPERTS", "PROMPT_TYPE"),
)
SMALL = {
    **dict.fromkeys(AS_THE_CHECKPOINT, ""),
    "BF16": "0",
    "DISTRIBUTED_BACKEND": "gloo",
    "SEQ_LENGTH": "48",
    "GLOBAL_BATCH_SIZE": "4",
    "TRAIN_ITERS": f"{STEPS}",
    "LR": "1e-2",
    "MIN_LR": "1e-3",
    "LR_DECAY_ITERS": "",
    "EVAL_ITERS": "0",
    "LORA_R": "4",
    "LORA_ALPHA": "8",
}
LAYOUTS = {
    "EP 2": {"TP": "1", "PP": "1", "EP": "2"},
    "TP 2 x EP 2": {"TP": "2", "PP": "1", "EP": "2", "ETP": "1"},
}


def losses_in(save: Path) -> list[float]:
    return [json.loads(line)["lm_loss"] for line in (save / "metrics.jsonl").read_text().splitlines()]


@dataclass
class Job:
    """Runs the scripts in a folder of its own."""

    folder: Path
    arguments: Callable[..., list[str]]
    workers: WorkerPool
    losses: dict[str, list[float]] = field(default_factory=dict)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def words(self, script: str, **variables: str) -> list[str]:
        words = self.arguments(f"mixtral/{script}", **SMALL, **variables)
        return words[next(i for i, word in enumerate(words) if word.endswith(".py")) + 1 :]

    def convert(self, script: str, **variables: str) -> None:
        convert(parse("convert", self.words(f"ckpt_convert_mixtral_{script}.sh", **variables)))

    def tune(self, layout: str, load: str) -> None:
        words = self.words(
            "tune_mixtral_8x7b_lora_ptd.sh",
            **LAYOUTS[layout],
            CKPT_LOAD_DIR=self.path(load),
            CKPT_SAVE_DIR=self.path(f"run {layout}"),
            DATA_PATH=self.path("rows"),
            TOKENIZER_PATH=self.path("hf"),
        )
        assert {"--moe-grouped-gemm", "--moe-alltoall-overlap-comm", "--lora-fusion"} <= {*words}
        assert self.workers.run(2, train, words) == [0, 0]
        self.losses[layout] = losses_in(self.folder / f"run {layout}")


@pytest.fixture(scope="module")
def job(
    tmp_path_factory: pytest.TempPathFactory, workers: WorkerPool, script_arguments: Callable[..., list[str]]
) -> Job:
    """The whole chain, once."""
    job = Job(tmp_path_factory.mktemp("mixtral"), script_arguments, workers)
    tokenizer = make_tokenizer("gpt2")
    dense = make_model("llama", job.folder / "dense", vocab_size=len(tokenizer), num_hidden_layers=2)
    tokenizer.save_pretrained(dense)
    upcycle(dense, job.folder / "hf", Recipe(noise=0.3))
    write_rows(job.folder / "rows", random_rows(8, len(tokenizer)))
    cut = {"TP": "2", "PP": "1", "EP": "2", "ETP": "1"}
    job.convert("hf2mcore", HF_MODEL_PATH=job.path("hf"), CKPT_SAVE_DIR=job.path("mg"), **cut)
    job.convert("mcore2hf", CKPT_LOAD_DIR=job.path("mg"), CKPT_SAVE_DIR=job.path("back"))
    for layout in LAYOUTS:
        job.tune(layout, "mg")
    run = job.path("run EP 2")
    job.convert("lora2hf", CKPT_LOAD_DIR=run, CKPT_SAVE_DIR=job.path("peft"))
    base = {"CKPT_LOAD_DIR": job.path("mg"), "LORA_LOAD": run}
    job.convert("mcore2hf_lora", **base, CKPT_SAVE_DIR=job.path("merged"))
    job.convert("mg2mg_lora", **base, CKPT_SAVE_DIR=job.path("merged-mg"), TP="1", EP="4")
    job.convert("mcore2hf", CKPT_LOAD_DIR=job.path("merged-mg"), CKPT_SAVE_DIR=job.path("merged-back"))
    return job


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_there_and_back_is_bit_identical(job: Job) -> None:
    assert same(tensors(job.folder / "hf"), tensors(job.folder / "back" / "mg2hf"))
    ranks = sorted(path.name for path in (job.folder / "mg" / "iter_0000001").iterdir())
    assert [name for name in ranks if name.startswith("mp_rank")] == ["mp_rank_00_000", "mp_rank_01_001"]


def test_both_layouts_train_alike(job: Job) -> None:
    one, two = job.losses.values()
    assert len(one) == STEPS and one[-1] < one[0]
    # The sums of a step come in another order.
    assert one == pytest.approx(two, rel=1e-5)


def test_both_ways_of_merging_give_the_same_bits(job: Job) -> None:
    merged = tensors(job.folder / "merged" / "mg2hf")
    assert same(merged, tensors(job.folder / "merged-back" / "mg2hf"))
    base = tensors(job.folder / "hf")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert len([name for name in changed if ".experts." in name]) == 2 * 4 * 3


def test_the_adapter_is_what_peft_makes_of_the_merged_model(job: Job) -> None:
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(job.folder / "hf", dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, job.path("peft/mg2hf")).eval()
    merged = AutoModelForCausalLM.from_pretrained(job.folder / "merged" / "mg2hf", dtype=torch.float32).eval()
    tokens = torch.arange(3, 43).unsqueeze(0)
    with torch.inference_mode():
        expected, found = merged(tokens).logits, tuned(tokens).logits
    # Products of rank 4 in float32, added before or after the base's.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_answers_are_those_of_peft(job: Job, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(job.path("hf"))
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    expected = transformers_greedy(job.path("hf"), prompts, 12, job.path("peft/mg2hf"))
    assert expected != transformers_greedy(job.path("hf"), prompts, 12)
    (tmp_path / "prompts").write_text("\n".join(PROMPTS), encoding="utf-8")
    words = job.words(
        "generate_mixtral_8x7b_ptd.sh",
        **LAYOUTS["TP 2 x EP 2"],
        CKPT_LOAD_DIR=job.path("mg"),
        LORA_LOAD=job.path("run EP 2"),
        TOKENIZER_PATH=job.path("hf"),
        TASK="greedy",
        MAX_NEW_TOKENS="12",
        PROMPT_FILE=str(tmp_path / "prompts"),
        OUTPUT_FILE=str(tmp_path / "answers"),
    )
    assert job.workers.run(2, infer_on_rank, words, str(tmp_path / "out")) == [0, 0]
    rows: list[Any] = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]
    assert [row["token_ids"] for row in rows] == expected


@pytest.mark.slow
def test_the_script_starts_its_ranks_by_torchrun(job: Job, tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    variables = {
        **SMALL,
        **LAYOUTS["EP 2"],
        "NPROC": "2",
        "MASTER_PORT": "29641",
        "TORCHRUN": str(Path(sys.executable).with_name("torchrun")),
        "CKPT_LOAD_DIR": job.path("mg"),
        "CKPT_SAVE_DIR": str(tmp_path / "save"),
        "DATA_PATH": job.path("rows"),
        "TOKENIZER_PATH": job.path("hf"),
    }
    script = root / "examples" / "mcore" / "mixtral" / "tune_mixtral_8x7b_lora_ptd.sh"
    subprocess.run([script], env={**os.environ, **variables}, check=True, timeout=240)
    assert losses_in(tmp_path / "save") == pytest.approx(job.losses["EP 2"], rel=1e-6)
