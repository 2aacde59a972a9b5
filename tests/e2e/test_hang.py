"""A rank that stands still is named in one sentence, whoever it is."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.support.launch import Ranks
from tests.support.tiny import Tiny


@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named(stopped: int, tiny: Tiny, tmp_path: Path) -> None:
    """Rank 0 keeps the job's store where no launcher does: without it nobody can be asked."""
    save = tmp_path / "run"
    job = {"train_iters": 1000, "distributed_timeout_minutes": 0.1, "tensor_model_parallel_size": 2}
    with Ranks("posttrain_gpt.py", 2, tiny.words(**job, save=save)) as ranks:
        ranks.wait_until(
            lambda: (save / "metrics.jsonl").exists() and (save / "metrics.jsonl").stat().st_size > 0
        )
        ranks.processes[stopped].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        other = ranks.processes[1 - stopped]
        assert other.wait(60) == 1
        assert time.monotonic() - began < 45
        ranks.processes[stopped].kill()
        ended = ranks.wait()
    (sentence,) = ended.sentences
    assert sentence.startswith(
        f"error: rank {1 - stopped}: no progress within --distributed-timeout-minutes 0.1: "
    )
    assert "Traceback" not in "".join(ended.errors)
    if stopped == 1:
        assert "rank 1: no more signs of life" in sentence and "since step " in sentence
        assert "rank 0: waiting in " in sentence
    else:
        assert "rank 0 or its launcher, which keeps the job's store, does not answer" in sentence
