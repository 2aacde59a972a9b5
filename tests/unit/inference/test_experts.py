"""``inference.py`` with experts: the answers of transformers and PEFT however experts are cut over the ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from upcycle import Recipe, upcycle

from tests.support.generation import infer_on_rank, transformers_greedy
from tests.support.pool import WorkerPool
from tests.support.reference import Reference

PROMPTS = ("how are you?", "Name", "Name three fruits and a bread, and then some more of them.")
NEW_TOKENS = 12
CUTS = {
    "one rank": (1, ""),
    "EP 2 over two replicas": (2, "--expert-model-parallel-size 2"),
    "TP 2": (2, "--tensor-model-parallel-size 2"),
    "EP 2 over TP 2": (
        2,
        "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1 --expert-model-parallel-size 2",
    ),
    "EP 2 over TP 2 x 2 replicas": (
        4,
        "--tensor-model-parallel-size 2 --expert-model-parallel-size 2 --moe-token-dispatcher-type allgather",
    ),
    "EP 2 over PP 2 x 2 replicas": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"),
}
"""Name → world and flags. Three prompts for two replicas: one has nothing to answer while the other has."""


@pytest.fixture(scope="module")
def folders(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Four experts that differ, and an adapter on all of them and on attention."""
    folder = tmp_path_factory.mktemp("experts")
    upcycle(model_folder, folder / "model", Recipe(noise=0.5))
    reference = Reference(folder / "model")
    reference.add_adapter(rank=4, alpha=8)
    return folder / "model", reference.save_adapter(folder / "adapter")


@pytest.fixture(scope="module")
def expected(folders: tuple[Path, Path]) -> dict[str, list[list[int]]]:
    model, adapter = folders
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    found = {
        "base": transformers_greedy(str(model), prompts, NEW_TOKENS),
        "adapter": transformers_greedy(str(model), prompts, NEW_TOKENS, str(adapter)),
    }
    assert found["base"] != found["adapter"]
    return found


def answers(workers: WorkerPool, world: int, words: list[Any], folder: Path) -> list[list[int]]:
    output = folder / "answers.jsonl"
    words = [*words, "--prompt", *PROMPTS, "--output-file", output, "--max-new-tokens", NEW_TOKENS]
    words = [str(word) for word in words]
    assert set(workers.run(world, infer_on_rank, words, str(folder / "out"))) == {0}
    return [json.loads(line)["token_ids"] for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("cut", CUTS)
def test_answers_are_those_of_peft(
    cut: str,
    folders: tuple[Path, Path],
    expected: dict[str, list[list[int]]],
    workers: WorkerPool,
    tmp_path: Path,
) -> None:
    (world, flags), (model, adapter) = CUTS[cut], folders
    words = ["--load", model, "--lora-load", adapter, "--micro-batch-size", 1, *flags.split()]
    assert answers(workers, world, words, tmp_path) == expected["adapter"]


def test_replicas_that_share_experts_wait_for_longer_rows(
    folders: tuple[Path, Path],
    expected: dict[str, list[list[int]]],
    workers: WorkerPool,
    tmp_path: Path,
) -> None:
    """Batches of unlike rows and lengths, without an adapter; then one turn in which a replica has none."""
    words = ["--load", folders[0], "--micro-batch-size", 2, "--expert-model-parallel-size", 2]
    assert answers(workers, 2, words, tmp_path) == expected["base"]


def test_chat_over_replicas_that_share_experts(
    folders: tuple[Path, Path], workers: WorkerPool, tmp_path: Path
) -> None:
    words = ["--load", str(folders[0]), "--task", "chat", "--max-new-tokens", "6", "--seed", "5"]
    said = [(0.0, "how are you?\nName three\n")]
    workers.run(1, infer_on_rank, words, str(tmp_path / "alone"), said)
    workers.run(2, infer_on_rank, [*words, "--expert-model-parallel-size", "2"], str(tmp_path / "out"), said)
    alone = (tmp_path / "alone.0").read_text(encoding="utf-8")
    assert alone.count("You >> ") == 3
    assert (tmp_path / "out.0").read_text(encoding="utf-8") == alone
