"""Nodes that see each other's files, and nodes that do not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from mindspeed_lora.errors import Failed, PeerFailure
from mindspeed_lora.parallel.groups import destroy_groups
from tests.support.pool import WorkerPool
from tests.support.tiny import Tiny
from tests.support.training import train

JOB: dict[str, Any] = {"use_distributed_optimizer": True, "save_interval": 2, "lora_dropout": 0.1}


def train_on_node(words: list[str], save: str) -> tuple[int, str]:
    """A run on this rank, a node of its own; ``save`` may hold its number."""
    os.environ["NODE_RANK"] = os.environ["RANK"]
    try:
        return train([*words, "--save", save.format(node=os.environ["RANK"])]), ""
    except (Failed, PeerFailure) as error:
        destroy_groups()
        return error.exit_status, str(error)
    finally:
        del os.environ["NODE_RANK"]


def files(save: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(save)): path.read_bytes()
        for path in sorted(save.glob("iter_*/**/*"))
        if path.is_file() and path.suffix == ".safetensors"
    }


def losses(save: Path) -> list[float]:
    return [json.loads(line)["lm_loss"] for line in (save / "metrics.jsonl").read_text().splitlines()]


def test_every_node_holds_whole_checkpoints(tiny: Tiny, tmp_path: Path, workers: WorkerPool) -> None:
    shared, nodes = tmp_path / "shared", [tmp_path / "node0", tmp_path / "node1"]
    apart = tiny.words(**JOB, no_shared_storage=True)
    assert workers.run(2, train_on_node, tiny.words(**JOB), str(shared)) == [(0, "")] * 2
    save = str(tmp_path / "node{node}")
    assert workers.run(2, train_on_node, apart, save) == [(0, "")] * 2
    expected = files(shared)
    assert {name.split("/")[1] for name in expected} == {"adapter", "optimizer", "random"}
    for node in nodes:
        assert files(node) == expected
        assert (node / "adapter").is_symlink() and (
            node / "latest_checkpointed_iteration.txt"
        ).read_text() == "4"
    assert losses(nodes[0]) == losses(shared) and not (nodes[1] / "metrics.jsonl").exists()

    for node in nodes:
        shutil.rmtree(node / "iter_0000004")
        (node / "latest_checkpointed_iteration.txt").write_text("2")
    resume = [*apart, "--resume", "auto"]
    assert workers.run(2, train_on_node, resume, save) == [(0, "")] * 2
    assert [files(node) for node in nodes] == [expected] * 2 and losses(nodes[0]) == losses(shared)

    shutil.rmtree(nodes[1])
    (status, text), (_, silent) = workers.run(2, train_on_node, [*resume, "--train-iters", "6"], save)
    assert status == 1 and "rank 1 without a checkpoint; rank 0 after iteration 4" in text
    assert silent == "rank 0 failed"


def test_storage_that_is_not_shared_is_told_at_the_start(
    tiny: Tiny, tmp_path: Path, workers: WorkerPool
) -> None:
    found = workers.run(2, train_on_node, tiny.words(**JOB), str(tmp_path / "node{node}"))
    assert found[0][0] == 1
    assert "rank 1" in found[0][1] and "--no-shared-storage" in found[0][1]
    assert not list(tmp_path.glob("*/metrics.jsonl"))


def test_the_flag_where_storage_is_shared_changes_nothing(
    tiny: Tiny, tmp_path: Path, workers: WorkerPool
) -> None:
    words = tiny.words(**JOB, no_shared_storage=True)
    assert workers.run(2, train_on_node, words, str(tmp_path / "run")) == [(0, "")] * 2
    assert sorted(path.name for path in (tmp_path / "run").glob("iter_*")) == ["iter_0000002", "iter_0000004"]
