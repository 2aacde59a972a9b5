"""A run that was killed and taken up again is, bit for bit, the run that nobody killed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import Ranks, run_ranks
from tests.support.tiny import Tiny

STEPS = 8
SAVE_INTERVAL = 4
EXACT = ("iteration", "lm_loss", "grad_norm", "learning_rate", "tokens", "loss_tokens")
JOB: dict[str, Any] = {
    "train_iters": STEPS,
    "save_interval": SAVE_INTERVAL,
    # Many rows a step: long enough for the kill to fall between two checkpoints.
    "global_batch_size": 24,
    "lr_decay_style": "cosine",
    "variable_seq_lengths": True,
}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def latest(save: Path) -> int:
    try:
        return int((save / "latest_checkpointed_iteration.txt").read_text())
    except (OSError, ValueError):
        return -1


def metrics(save: Path) -> list[dict[str, Any]]:
    lines = (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: record[key] for key in EXACT} for record in map(json.loads, lines)]


def steps_done(save: Path) -> int:
    """Whole lines of the metrics, which are written step by step."""
    try:
        return (save / "metrics.jsonl").read_text(encoding="utf-8").count("\n")
    except OSError:
        return 0


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint; of the state only what does not tell the time."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def assert_same_run(save: Path, expected: Path) -> None:
    assert latest(save) == STEPS
    assert metrics(save) == metrics(expected)
    assert [record["iteration"] for record in metrics(save)] == list(range(1, STEPS + 1))
    ours, theirs = (files(folder / f"iter_{STEPS:07d}") for folder in (save, expected))
    assert ours.keys() == theirs.keys() and len(ours) >= 3
    assert [name for name in ours if ours[name] != theirs[name]] == []


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        pytest.param(1, {"lora_dropout": 0.1}, marks=pytest.mark.slow),
        # By default test_killed_while_saving has this layout.
        pytest.param(2, {**TP2, "lora_dropout": 0.1}, marks=pytest.mark.slow),
        (2, {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}),
        pytest.param(
            2,
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2, "lora_r": None},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4, {**TP2, "pipeline_model_parallel_size": 2, "lora_dropout": 0.1}, marks=pytest.mark.slow
        ),
        pytest.param(4, {**TP2, "use_distributed_optimizer": True}, marks=pytest.mark.slow),
        pytest.param(
            2, {"context_parallel_size": 2, "use_distributed_optimizer": True}, marks=pytest.mark.slow
        ),
    ],
    ids=[
        "dropout",
        "tp2-sp-dropout",
        "dp2-distopt-overlap",
        "pp2-vpp2-all-parameters",
        "tp2-pp2",
        "tp2-dp2",
        "cp2",
    ],
)
def test_killed_between_checkpoints(
    world_size: int, flags: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    def words(save: Path, **more: Any) -> list[str]:
        return tiny.words(**{**JOB, **flags, **more}, save=save)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_ranks("posttrain_gpt.py", world_size, words(whole)).statuses == [0] * world_size
    with Ranks("posttrain_gpt.py", world_size, words(killed)) as ranks:
        ranks.wait_until(lambda: steps_done(killed) > SAVE_INTERVAL)
        ranks.kill()
    assert latest(killed) == SAVE_INTERVAL, "killed too late for this test"
    ended = run_ranks("posttrain_gpt.py", world_size, words(killed, resume="auto"))
    assert ended.statuses == [0] * world_size, ended.errors
    assert_same_run(killed, whole)


def test_killed_while_saving(tiny: Tiny, tmp_path: Path) -> None:
    """Killed again and again while a checkpoint is written: the latest one is whole each time."""

    def words(save: Path, **more: Any) -> list[str]:
        job = {**JOB, **TP2, "save_interval": 1, "global_batch_size": 2, "lora_dropout": 0.1, **more}
        return tiny.words(**job, save=save)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_ranks("posttrain_gpt.py", 2, words(whole))
    caught = 0
    for delay in (0.0, 0.005):
        before = latest(killed)
        with Ranks("posttrain_gpt.py", 2, words(killed, resume="auto")) as ranks:
            wanted = max(before, 0) + 2
            ranks.wait_until(lambda wanted=wanted: any(killed.glob(f".iter_{wanted:07d}.tmp-*")))  # type: ignore[misc]
            time.sleep(delay)
            ranks.kill()
        caught += bool(list(killed.glob(".iter_*.tmp-*")))
        assert before < latest(killed) <= wanted
        folder = killed / f"iter_{latest(killed):07d}"
        assert files(folder) == files(whole / folder.name)
        assert (folder / "adapter" / "adapter_config.json").is_file()
    assert caught, "no kill fell into the writing of a checkpoint"
    ended = run_ranks("posttrain_gpt.py", 2, words(killed, resume="auto"))
    assert ended.statuses == [0, 0], ended.errors
    assert_same_run(killed, whole)
    assert not list(killed.glob(".iter_*"))


def test_told_to_leave_and_taken_up_in_another_layout(tiny: Tiny, tmp_path: Path) -> None:
    """One rank of four gets the signal; two ranks go on with what all of them saved."""

    def words(save: Path, **more: Any) -> list[str]:
        job = {**JOB, "save_interval": 100, "global_batch_size": 12, "lora_dropout": 0.1, **more}
        return tiny.words(**job, save=save)

    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert run_ranks("posttrain_gpt.py", 1, words(whole)).statuses == [0]
    stages = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
    with Ranks("posttrain_gpt.py", 4, words(moved, **TP2, **stages)) as ranks:
        ranks.wait_until(lambda: steps_done(moved) > 2)
        ranks.processes[3].send_signal(signal.SIGTERM)
        assert ranks.wait().statuses == [75] * 4
    stopped_at = latest(moved)
    assert 2 < stopped_at < STEPS, "left too late for this test"
    ended = run_ranks("posttrain_gpt.py", 2, words(moved, use_distributed_optimizer=True, resume="auto"))
    assert ended.statuses == [0, 0], ended.errors
    assert "going on in another layout: tensor parallel 2 → 1, pipeline parallel 2 → 1" in ended.errors[0]
    for found, expected in zip(metrics(moved), metrics(whole), strict=True):
        assert found["lm_loss"] == pytest.approx(expected["lm_loss"], rel=1e-5)
        same = ("iteration", "tokens", "loss_tokens", "learning_rate")
        assert [found[key] for key in same] == [expected[key] for key in same]
