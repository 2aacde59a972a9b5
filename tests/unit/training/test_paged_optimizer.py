"""The paged optimizer beside the resident one: the same bits, in the files too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_lora.device import runtime
from mindspeed_lora.device.paged_memory import StagedMemory
from mindspeed_lora.parallel.groups import ParallelGroups, destroy_groups
from mindspeed_lora.training import optimizer, optimizer_states
from mindspeed_lora.training.optimizer_files import read_optimizer, write_optimizer
from mindspeed_lora.training.session import TrainingSession
from tests.support.pool import WorkerPool
from tests.support.tiny import Tiny, join, open_session
from tests.unit.device.test_paged_memory import HostCopies
from tests.unit.training.test_optimizer import LR, give_gradients, values

PORTION = 1024
"""Elements: matrices of the tiny model become several portions, and its norms share one window."""


@pytest.fixture(autouse=True)
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_states, "PORTION", PORTION)
    monkeypatch.setattr(runtime, "_cpu_has_bf16", lambda: True)


@pytest.fixture(params=["mapped", "staged"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The staged form is CUDA's; its copies are those of the host here."""
    if request.param == "staged":
        monkeypatch.setattr(optimizer, "paged_memory", lambda count, _: StagedMemory(count, HostCopies()))


def steps(session: TrainingSession, numbers: range) -> list[float]:
    norms = []
    for number in numbers:
        give_gradients(session, number)
        norms.append(session.optimizer.step(LR).grad_norm)
    return norms


def states(session: TrainingSession) -> dict[str, torch.Tensor]:
    held = session.optimizer
    return {
        f"{owned.parameter.name} {key}": value.clone()
        for owned in held.slices
        for key, value in held.state_of(owned).items()
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("lora_r", [4, None], ids=["adapter", "all parameters"])
def test_the_same_bits_and_files(
    groups: ParallelGroups, tiny: Tiny, tmp_path: Path, lora_r: int | None, bf16: bool
) -> None:
    flags = {"lora_r": lora_r, "bf16": bf16, "clip_grad": 0.5, "weight_decay": 0.1}
    plain = open_session(tiny.words(**flags), groups)
    paged = open_session(tiny.words(**flags, paged_optimizer=True, paged_optimizer_dir=tmp_path), groups)
    sizes = [portion.last - portion.first for portion in paged.optimizer.states.portions]
    assert max(sizes) == PORTION if lora_r is None else len(sizes) > 8
    assert_same(states(paged), states(plain))
    assert steps(paged, range(3)) == steps(plain, range(3))
    assert_same(values(paged), values(plain))
    assert_same(states(paged), states(plain))

    folders = {name: tmp_path / name for name in ("plain", "paged")}
    for folder, session in zip(folders.values(), (plain, paged), strict=True):
        folder.mkdir()
        write_optimizer(folder, session.optimizer, groups)
    [ours], [theirs] = (list(folder.iterdir()) for folder in folders.values())
    assert ours.name == theirs.name and ours.read_bytes() == theirs.read_bytes()
    assert len(load_file(ours)) == 3 * len(paged.optimizer.slices)

    # Either goes on from the other's file.
    other = open_session(tiny.words(**flags, paged_optimizer=True, paged_optimizer_dir=tmp_path), groups)
    read_optimizer(folders["plain"], other.optimizer, 3)
    other.optimizer.publish()
    assert_same(values(other), values(plain))
    assert steps(other, range(3, 5)) == steps(plain, range(3, 5))
    assert_same(values(other), values(plain))
    assert_same(states(other), states(plain))


def test_masters_are_paged_where_they_are_tensors_of_their_own(
    groups: ParallelGroups, tiny: Tiny, tmp_path: Path
) -> None:
    for bf16, kept in ((False, 2), (True, 3)):
        words = tiny.words(bf16=bf16, paged_optimizer=True, paged_optimizer_dir=tmp_path)
        held = open_session(words, groups).optimizer
        sizes = [optimizer_states.aligned(owned.stop - owned.start) for owned in held.slices]
        assert isinstance(held.states, optimizer_states.PagedStates)
        assert len(held.states.memory.values) == kept * sum(sizes)


def cut_state(words: list[str], paging: str | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Norms and the values of this rank after three steps with the distributed optimizer."""
    optimizer_states.PORTION = PORTION
    groups = join()
    flags = [] if paging is None else ["--paged-optimizer", "--paged-optimizer-dir", paging]
    session = open_session([*words, *flags], groups)
    norms = []
    for step in range(3):
        session.optimizer.zero_grad()
        for number, parameter in enumerate(session.trained):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.param.main_grad.copy_(torch.randn(parameter.param.shape, generator=generator))
        norms.append(session.optimizer.step(LR).grad_norm)
        # As the forward pass of the next step does; two gathers of one parameter would race.
        session.optimizer.finish_gather()
    found = values(session) | states(session)
    destroy_groups()
    return norms, found


def test_the_distributed_optimizer(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    words = tiny.words(lora_r=None, use_distributed_optimizer=True, overlap_param_gather=True)
    plain = workers.run(2, cut_state, words, None)
    for (norms, found), (expected_norms, expected) in zip(
        workers.run(2, cut_state, words, str(tmp_path)), plain, strict=True
    ):
        assert norms == expected_norms
        assert_same(found, expected)
