"""What ``--dry-run`` says a job will hold is what it holds: a real model in eight layouts, on the CPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Assets
from tests.support.forked import ROOT
from tests.support.launch import run_ranks
from tests.support.rows import random_rows, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LAYOUTS = {
    "one process": (1, "--micro-batch-size 1"),
    "four rows at once": (1, "--micro-batch-size 4"),
    "recomputation": (
        1,
        "--micro-batch-size 4 --recompute-granularity full --recompute-method uniform --recompute-num-layers 2",
    ),
    "tp2 sp": (2, "--micro-batch-size 2 --tensor-model-parallel-size 2 --sequence-parallel"),
    "nf4": (1, "--micro-batch-size 2 --qlora --quant-double"),
    "nf4 tp2 sp": (
        2,
        "--micro-batch-size 2 --tensor-model-parallel-size 2 --sequence-parallel --qlora --quant-double",
    ),
    "pp2": (2, "--micro-batch-size 2 --pipeline-model-parallel-size 2"),
    "pp2 vpp zero1": (
        2,
        "--micro-batch-size 1 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 5",
    ),
}


def _predicted(words: list[str], world_size: int) -> float:
    """MiB of the rank that holds most."""
    command = [
        sys.executable,
        str(ROOT / "posttrain_gpt.py"),
        *words,
        "--dry-run",
        "--world-size",
        str(world_size),
    ]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    [total] = re.findall(r"^ total +\|(.*)$", told, re.MULTILINE)
    return max(float(cell.replace(",", "")) for cell in total.split())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_peak_is_predicted_within_a_tenth(layout: str, smollm2: Assets, tmp_path: Path) -> None:
    world_size, flags = LAYOUTS[layout]
    data = write_rows(tmp_path / "rows", random_rows(16, 49_000, 512))
    words = [
        *(
            "--stage",
            "sft",
            "--load",
            str(smollm2.padded_model),
            "--data-path",
            str(data),
            "--seq-length",
            "512",
        ),
        *(
            "--global-batch-size",
            "8",
            "--lora-r",
            "16",
            "--train-iters",
            "2",
            "--save",
            str(tmp_path / "run"),
        ),
        *flags.split(),
    ]
    predicted = _predicted(words, world_size)
    ended = run_ranks("posttrain_gpt.py", world_size, words, timeout=900, fresh=True)
    assert ended.statuses == [0] * world_size, ended.errors
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    measured = max(json.loads(line)["peak_memory_bytes"] for line in lines) / 2**20
    print(f"{layout}: predicted {predicted:.0f} MiB, held {measured:.0f}")
    assert predicted == pytest.approx(measured, rel=0.1), (
        f"predicted {predicted:.0f} MiB, held {measured:.0f}"
    )
