"""What torchrun starts anew goes on by itself from the last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.launch import ROOT
from tests.support.pool import WorkerPool, free_port
from tests.support.tiny import Tiny
from tests.support.training import train

JOB: dict[str, Any] = {
    "train_iters": 5,
    "save_interval": 2,
    "global_batch_size": 6,
    "lora_dropout": 0.1,
    "tensor_model_parallel_size": 2,
}


def losses(save: Path) -> list[tuple[int, float]]:
    lines = (save / "metrics.jsonl").read_text().splitlines() if (save / "metrics.jsonl").exists() else []
    return [(record["iteration"], record["lm_loss"]) for record in map(json.loads, lines)]


def rank_1_below(launcher: int) -> int | None:
    """The process of rank 1 among the children of a launcher."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and b"\0RANK=1\0" in (path / "environ").read_bytes():
                return int(path.name)
        except OSError:
            continue
    return None


def test_a_killed_rank_is_started_anew(tiny: Tiny, tmp_path: Path, workers: WorkerPool) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert workers.run(2, train, tiny.words(**JOB, save=whole)) == [0, 0]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    launch += [f"--master-port={free_port()}", str(ROOT / "posttrain_gpt.py")]
    errors = tmp_path / "errors"
    with errors.open("w") as stream:
        process = subprocess.Popen(
            [*launch, *tiny.words(**JOB, overwrite=True, save=broken)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stream,
        )
    try:
        deadline = time.monotonic() + 120
        while len(losses(broken)) < 3:
            assert process.poll() is None and time.monotonic() < deadline, errors.read_text()
            time.sleep(0.002)
        victim = rank_1_below(process.pid)
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        assert process.wait(120) == 0, errors.read_text()
    finally:
        process.kill()
    assert "restart 1 of this job: --resume auto is taken" in errors.read_text()
    assert "going on after iteration 2" in errors.read_text()
    assert losses(broken) == losses(whole), "bit for bit the run that nobody killed"
