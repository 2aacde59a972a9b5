"""Optimizer state written by one layout and read by another, every element at its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mindspeed_lora.parallel.groups import destroy_groups
from mindspeed_lora.training.optimizer_files import STATES, read_optimizer, write_optimizer
from mindspeed_lora.training.optimizer_states import OwnedSlice
from mindspeed_lora.training.shard_slice import ShardSlice
from tests.support.pool import WorkerPool
from tests.support.tiny import Tiny, join, open_session

LAYOUTS: dict[str, tuple[int, int, int, bool]] = {
    "one": (1, 1, 1, False),
    "tp2": (2, 1, 1, False),
    "tp4": (4, 1, 1, False),
    "pp2": (1, 2, 1, False),
    "tp2 pp2": (2, 2, 1, False),
    "dp2": (1, 1, 2, False),
    "dp2 cut": (1, 1, 2, True),
    "tp2 dp2 cut": (2, 1, 2, True),
}


def expected(owned: OwnedSlice, state: str, vocabulary: int) -> torch.Tensor:
    """What stands at the slice's places: numbers of name, state and place; zero in rows that pad the vocabulary."""
    piece = ShardSlice.of(owned.parameter, owned.start, owned.stop)
    positions = piece.index()
    values = positions.float() + 1e6 * STATES.index(state) + sum(piece.name.encode())
    if piece.name.endswith(("word_embeddings.weight", "output_layer.weight")):
        values[positions >= vocabulary * piece.shape[1]] = 0.0
    return values


def write(words: list[str], tp: int, pp: int, folder: Path) -> None:
    groups = join(tp, pp)
    session = open_session(words, groups)
    for owned in session.optimizer.slices:
        state = {key: expected(owned, key, session.plan.shape.vocab_size) for key in STATES}
        session.optimizer.restore(owned, state, 3)
    write_optimizer(folder, session.optimizer, groups)
    destroy_groups()


def read(words: list[str], tp: int, pp: int, folder: Path) -> list[str]:
    """The names and states of slices that are not as they should be, and what the model then holds."""
    groups = join(tp, pp)
    session = open_session(words, groups)
    read_optimizer(folder, session.optimizer, 3)
    session.optimizer.publish()
    wrong = [
        f"{owned.parameter.name}|{key}"
        for owned in session.optimizer.slices
        for key, value in session.optimizer.state_of(owned).items()
        if not torch.equal(value, expected(owned, key, session.plan.shape.vocab_size))
    ]
    for parameter in session.trained:
        whole = OwnedSlice(parameter, 0, parameter.param.numel(), parameter.param)
        if not torch.equal(
            parameter.param.view(-1), expected(whole, "master", session.plan.shape.vocab_size)
        ):
            wrong.append(f"{parameter.name} in the model")
    destroy_groups()
    return wrong


def move(workers: WorkerPool, job: Tiny, source: str, target: str, folder: Path, **flags: object) -> None:
    for layout, function in ((source, write), (target, read)):
        tp, pp, dp, cut = LAYOUTS[layout]
        words = job.words(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            use_distributed_optimizer=cut,
            **flags,
        )
        for wrong in workers.run(
            tp * pp * dp, function, [*words, "--global-batch-size", "4"], tp, pp, folder
        ):
            assert not wrong


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("one", "tp2 pp2"),
        ("tp2", "one"),
        ("tp4", "pp2"),
        ("pp2", "tp2"),
        ("dp2", "one"),
        ("dp2 cut", "tp2"),
        ("tp2 dp2 cut", "dp2 cut"),
        ("one", "tp2 dp2 cut"),
    ],
)
def test_adapters(workers: WorkerPool, tiny: Tiny, tmp_path: Path, source: str, target: str) -> None:
    move(workers, tiny, source, target, tmp_path)


@pytest.mark.parametrize(
    ("source", "target"), [("one", "tp2"), ("tp4", "pp2"), ("pp2", "tp2 pp2"), ("tp2 dp2 cut", "one")]
)
def test_all_parameters_of_a_vocabulary_that_tp_does_not_divide(
    workers: WorkerPool, tiny: Tiny, tiny_tied: Tiny, tmp_path: Path, source: str, target: str
) -> None:
    move(workers, tiny if target != "pp2" else tiny_tied, source, target, tmp_path, lora_r=None)


def test_only_one_of_several_copies_is_written(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "copies").mkdir()
    (tmp_path / "cut").mkdir()
    workers.run(2, write, tiny.words(), 1, 1, tmp_path / "copies")
    workers.run(2, write, tiny.words(use_distributed_optimizer=True), 1, 1, tmp_path / "cut")
    assert len(list((tmp_path / "copies").iterdir())) == 1
    assert len(list((tmp_path / "cut").iterdir())) == 2
