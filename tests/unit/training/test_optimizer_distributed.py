"""The optimizer over ranks: who owns what, one norm for all, the same update in every layout."""

from __future__ import annotations

import math

import pytest
import torch

from mindspeed_lora.parallel.groups import destroy_groups
from mindspeed_lora.training.session import TrainingSession
from mindspeed_lora.training.shard_slice import ShardSlice
from tests.support.pool import WorkerPool
from tests.support.shards import Shard, assemble
from tests.support.tiny import Tiny, join, open_session
from tests.support.training import parameter_shards

LAYOUTS = {"one": (1, 1, 1), "tp": (2, 1, 1), "pp": (1, 2, 1), "dp": (1, 1, 2), "tp × pp": (2, 2, 1)}


def whole_gradient(name: str, shape: tuple[int, ...], vocabulary: int) -> torch.Tensor:
    """A gradient that depends on name and place alone; zero on rows that pad the vocabulary."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    gradient = torch.randn(torch.Size((vocabulary, *shape[1:])), generator=generator) * 1e-2
    if "embedding" not in name and "output_layer" not in name:
        return torch.randn(shape, generator=generator) * 1e-2
    return torch.cat([gradient, torch.zeros(shape[0] - vocabulary, *shape[1:])])


def give_gradients(session: TrainingSession) -> None:
    session.optimizer.zero_grad()
    for parameter in session.trained:
        whole = whole_gradient(parameter.name, parameter.shape, session.plan.shape.vocab_size)
        mine = whole.view(-1)[ShardSlice.of(parameter, 0, parameter.param.numel()).index()]
        parameter.param.main_grad.copy_(mine.view_as(parameter.param))


def two_steps(words: list[str], tp: int, pp: int) -> tuple[list[float], list[Shard], list[Shard]]:
    """Gradient norms, the parameters after two steps, and what this rank's optimizer owns of them."""
    groups = join(tp, pp)
    session = open_session(words, groups)
    norms = []
    for _ in range(2):
        give_gradients(session)
        norms.append(session.optimizer.step(1e-2).grad_norm)
    owned = []
    for piece in session.optimizer.slices:
        positions = ShardSlice.of(piece.parameter, piece.start, piece.stop).index()
        values = piece.master.detach().clone()
        owned.append(Shard(piece.parameter.name, piece.parameter.shape, positions, values))
    shards = parameter_shards(session)
    destroy_groups()
    return norms, shards, owned


def run(
    workers: WorkerPool, tiny: Tiny, layout: str, **flags: object
) -> list[tuple[list[float], list[Shard], list[Shard]]]:
    tp, pp, dp = LAYOUTS[layout]
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return workers.run(tp * pp * dp, two_steps, tiny.words(clip_grad=0.5, **sizes, **flags), tp, pp)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
@pytest.mark.parametrize("kind", ["adapter", "all", "tied"])
def test_every_layout_counts_each_parameter_once_and_updates_alike(
    workers: WorkerPool, tiny: Tiny, tiny_tied: Tiny, layout: str, kind: str
) -> None:
    job = tiny_tied if kind == "tied" else tiny
    flags: dict[str, object] = {} if kind == "adapter" else {"lora_r": None}
    [(expected_norms, expected, _)] = run(workers, job, "one", **flags)
    ranks = run(workers, job, layout, **flags)
    for norms, _, _ in ranks:
        assert norms == pytest.approx(expected_norms, rel=1e-6)
    whole = assemble([expected])
    for name, found in assemble(shards for _, shards, _ in ranks).items():
        rows = whole[name].size(0)
        torch.testing.assert_close(found[:rows], whole[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("flags", [{}, {"lora_r": None}], ids=["adapter", "all"])
def test_the_distributed_optimizer_cuts_the_state_without_gap_or_overlap(
    workers: WorkerPool, tiny: Tiny, flags: dict[str, object]
) -> None:
    ranks = run(workers, tiny, "dp", use_distributed_optimizer=True, **flags)
    plain = run(workers, tiny, "dp", **flags)
    counts: dict[str, torch.Tensor] = {}
    for _, _, owned in ranks:
        for shard in owned:
            count = counts.setdefault(shard.name, torch.zeros(math.prod(shard.shape), dtype=torch.int64))
            count[shard.positions] += 1
    assert counts and all(bool((count == 1).all()) for count in counts.values())
    sizes = [sum(len(shard.values) for shard in owned) for _, _, owned in ranks]
    assert max(sizes) < 0.6 * sum(sizes), "each holds about half"
    assert ranks[0][0] == pytest.approx(plain[0][0], rel=1e-6)
    found = assemble(shards for _, shards, _ in ranks)
    for name, expected in assemble(shards for _, shards, _ in plain).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7, msg=name)


def overflow_on(words: list[str], rank: int) -> tuple[bool, bool]:
    """Whether the step is skipped and the parameters stay, where one rank's gradient has an infinity."""
    groups = join(tp=2)
    session = open_session(words, groups)
    give_gradients(session)
    if groups.rank == rank:
        session.trained[0].param.main_grad.view(-1)[0] = math.inf
    before = [p.param.detach().clone() for p in session.trained]
    outcome = session.optimizer.step(1e-2)
    same = all(torch.equal(p.param, old) for p, old in zip(session.trained, before, strict=True))
    destroy_groups()
    return outcome.skipped, same


def test_an_overflow_on_one_rank_skips_the_step_on_all(workers: WorkerPool, tiny: Tiny) -> None:
    words = tiny.words(tensor_model_parallel_size=2, fp16=True, lora_target_modules=("linear_proj",))
    assert workers.run(2, overflow_on, words, 1) == [(True, True)] * 2
