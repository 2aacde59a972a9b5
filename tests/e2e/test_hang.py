"""A rank that stands still, or is gone, is named in one sentence, whoever it is."""

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
        # Two signs of life, which tell of a step.
        time.sleep(1.5)
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


@pytest.mark.parametrize("killed", [1, 0])
def test_a_killed_rank_is_named(killed: int, tiny: Tiny, tmp_path: Path) -> None:
    """Long before any time-out; of rank 0, which keeps the store here, what it was doing cannot be asked."""
    save = tmp_path / "run"
    with Ranks("posttrain_gpt.py", 3, tiny.words(train_iters=1000, global_batch_size=3, save=save)) as ranks:
        ranks.wait_until(
            lambda: (save / "metrics.jsonl").exists() and (save / "metrics.jsonl").stat().st_size > 0
        )
        ranks.kill(killed)
        began = time.monotonic()
        ended = ranks.wait()
        assert time.monotonic() - began < 40
    assert [status for rank, status in enumerate(ended.statuses) if rank != killed] == [1, 1]
    (sentence,) = ended.sentences
    assert "Traceback" not in "".join(ended.errors)
    assert sentence.endswith("the last checkpoint is whole, start again with --resume auto")
    if killed == 1:
        assert "lost contact with rank 1 in step " in sentence
        assert ": gone without a word (killed, " in sentence
    else:
        assert "lost contact with rank 0 or its launcher, which keeps the job's store: " in sentence
