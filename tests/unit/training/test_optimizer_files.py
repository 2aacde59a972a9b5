"""Optimizer state on disk: what a slice is of the whole tensor, and files that are not whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_lora.errors import Failed
from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.training.optimizer_files import read_optimizer, write_optimizer
from mindspeed_lora.training.session import TrainingSession
from tests.support.tiny import Tiny, open_session


@pytest.fixture
def session(groups: ParallelGroups, tiny: Tiny) -> TrainingSession:
    return open_session(tiny.words(lora_target_modules=("linear_fc1",)), groups)


@pytest.fixture
def written(session: TrainingSession, groups: ParallelGroups, tmp_path: Path) -> Path:
    for parameter in session.trained:
        parameter.param.main_grad.fill_(0.01)
    session.optimizer.step(1e-2)
    write_optimizer(tmp_path, session.optimizer, groups)
    return tmp_path


def test_state_stands_under_canonical_names(written: Path, session: TrainingSession) -> None:
    [file] = written.iterdir()
    tensors = load_file(file)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert set(tensors) == {
        f"decoder.layers.{layer}.mlp.linear_fc1.lora_{factor}|{state}"
        for layer in range(4)
        for factor in "ab"
        for state in ("master", "exp_avg", "exp_avg_sq")
    }


def test_it_is_read_back_bit_for_bit(written: Path, session: TrainingSession) -> None:
    optimizer = session.optimizer
    before = [
        {key: value.clone() for key, value in optimizer.state_of(owned).items()} for owned in optimizer.slices
    ]
    for owned in optimizer.slices:
        zeros = {key: torch.zeros_like(value) for key, value in optimizer.state_of(owned).items()}
        optimizer.restore(owned, zeros, 0)
    read_optimizer(written, optimizer, updates_done=7)
    for owned, expected in zip(optimizer.slices, before, strict=True):
        for key, value in optimizer.state_of(owned).items():
            assert torch.equal(value, expected[key]), (owned.parameter.name, key)
    assert optimizer.updates_done == 7


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def no_header(file: Path) -> None:
    file.write_bytes(b"\xff" * 200)


def no_table(file: Path) -> None:
    tensors = load_file(file)
    save_file(tensors, file)


def broken_table(file: Path) -> None:
    tensors = load_file(file)
    save_file(
        tensors, file, metadata={"slices": '{"decoder.layers.0.mlp.linear_fc1.lora_a": {"shape": [4]}}'}
    )


def lost_moment(file: Path) -> None:
    _without(file, "decoder.layers.1.mlp.linear_fc1.lora_b|exp_avg")


def _without(file: Path, name: str) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata=metadata)


def gone(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize(
    "damage",
    [truncate, empty, no_header, no_table, broken_table, lost_moment, gone],
    ids=lambda d: d.__name__,
)
def test_what_is_not_whole_is_one_sentence(
    written: Path, session: TrainingSession, damage: Callable[[Path], None]
) -> None:
    damage(next(written.iterdir()))
    with pytest.raises(Failed) as caught:
        read_optimizer(written, session.optimizer, 1)
    text = str(caught.value)
    assert str(written) in text and "--no-load-optim" in text
    assert "\n" not in text and len(text) < 400


def test_a_state_of_another_shape_is_one_sentence(written: Path, groups: ParallelGroups, tiny: Tiny) -> None:
    other = open_session(tiny.words(lora_target_modules=("linear_fc1",), lora_r=3), groups)
    with pytest.raises(Failed, match=r"decoder.layers.0.mlp.linear_fc1.lora_a \[3, 48\]"):
        read_optimizer(written, other.optimizer, 1)


def test_a_parameter_that_was_not_trained_is_one_sentence(
    written: Path, groups: ParallelGroups, tiny: Tiny
) -> None:
    other = open_session(tiny.words(lora_target_modules=("linear_fc2",)), groups)
    with pytest.raises(Failed, match="linear_fc2.lora_a"):
        read_optimizer(written, other.optimizer, 1)
