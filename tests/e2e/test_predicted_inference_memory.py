"""What ``--dry-run`` says generation and evaluation will hold is what they hold: a real model on the CPU."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Assets
from tests.support.benchmark_files import sentence, write_mmlu
from tests.support.forked import ROOT
from tests.support.peak import peak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LAYOUTS = {
    "one process": (1, "--micro-batch-size 6 --task greedy"),
    "beams": (1, "--micro-batch-size 3 --num-beams 4 --task beam_search"),
    "tp2": (2, "--micro-batch-size 6 --tensor-model-parallel-size 2 --task greedy"),
    "pp2": (2, "--micro-batch-size 6 --pipeline-model-parallel-size 2 --task greedy"),
    "nf4": (1, "--micro-batch-size 6 --task greedy --qlora"),
}


def predicted(script: str, words: list[str], world_size: int) -> float:
    """MiB of the rank that holds most."""
    command = [sys.executable, str(ROOT / script), *words, "--dry-run", "--world-size", str(world_size)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout
    [total] = re.findall(r"^ memory: total +\| ([\d,]+) MiB", told, re.MULTILINE)
    return float(total.replace(",", ""))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def held(script: str, words: list[str], world_size: int) -> float:
    """MiB of the process that held most."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    return peak(*(launch if world_size > 1 else ()), str(ROOT / script), *words) / 2**20


def compare(name: str, script: str, words: list[str], world_size: int) -> None:
    before, after = predicted(script, words, world_size), held(script, words, world_size)
    print(f"{name}: predicted {before:.0f} MiB, held {after:.0f}")
    assert before == pytest.approx(after, rel=0.1), f"predicted {before:.0f} MiB, held {after:.0f}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generation(layout: str, smollm2: Assets, tmp_path: Path) -> None:
    world_size, flags = LAYOUTS[layout]
    draw = random.Random(1)
    prompts = "".join(json.dumps({"prompt": sentence(draw, 500)}) + "\n" for _ in range(6))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    words = ["--load", str(smollm2.padded_model), "--prompt-file", str(tmp_path / "prompts.jsonl")]
    words += ["--max-new-tokens", "10", *flags.split()]
    compare(layout, "inference.py", words, world_size)


def test_evaluation(smollm2: Assets, tmp_path: Path) -> None:
    path = write_mmlu(tmp_path / "mmlu")
    words = ["--load", str(smollm2.padded_model), "--task", "mmlu", "--task-data-path", str(path)]
    compare("mmlu", "evaluation.py", [*words, "--evaluation-batch-size", "6"], 1)
