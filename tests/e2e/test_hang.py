"""A rank that stands still, or is gone, is named in one sentence, whoever it is."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.support.benchmark_files import write_mmlu, write_model
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


@pytest.mark.parametrize("program", ["evaluation.py", pytest.param("inference.py", marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_while_others_are_answered_is_named(program: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--load", write_model(tmp_path / "model"), "--tensor-model-parallel-size", 2]
    if program == "evaluation.py":
        questions = write_mmlu(tmp_path / "mmlu", questions=300)
        words += ["--task", "mmlu", "--task-data-path", questions, "--output-dir", out]
        config, phase = out / "config.yaml", "--task mmlu"
    else:
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": "green river"}) + "\n" for _ in range(2000)))
        words += ["--task", "greedy", "--prompt-file", prompts, "--output-file", out / "answers.jsonl"]
        config, phase = out / "answers.config.yaml", "--task greedy"
    with Ranks(program, 2, words) as ranks:
        ranks.wait_until(config.exists)
        time.sleep(0.5)
        ranks.kill(1)
        ended = ranks.wait()
    assert ended.statuses[0] == 1
    (sentence,) = ended.sentences
    assert "Traceback" not in "".join(ended.errors)
    assert sentence.startswith(
        f"error: rank 0: lost contact with rank 1 in {phase}: gone without a word (killed, "
    )
    assert sentence.endswith("; what is written is whole, start again")
    assert sorted(path.name for path in out.iterdir()) == [config.name]
