"""Overlapped communication: nothing is read before it is there, and only complete gradients travel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mindspeed_lora.parallel.groups import destroy_groups
from mindspeed_lora.training.session import TrainingSession
from tests.support.pool import WorkerPool
from tests.support.tiny import Tiny, join, open_session

Words = list[str]
OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
FULL_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
STEPS = 3


class LateGather:
    """A gather whose result is not there before it is waited for: until then what others own is not a number."""

    def __init__(self, parameters: torch.Tensor, group: dist.ProcessGroup) -> None:
        self.parameters, rank = parameters, dist.get_rank(group)
        shares = parameters.chunk(dist.get_world_size(group))
        self.whole = torch.empty_like(parameters)
        self.work = dist.all_gather_into_tensor(self.whole, shares[rank].clone(), group=group, async_op=True)
        for owner, share in enumerate(shares):
            if owner != rank:
                share.fill_(torch.nan)

    def wait(self) -> None:
        self.work.wait()
        self.parameters.copy_(self.whole)


def delay_gathers(session: TrainingSession) -> int:
    """Makes every gather of the session a late one; returns the number of bucket groups."""
    for chunk in session.model:
        chunk.start_gather = LateGather
    return sum(len(chunk.bucket_groups) for chunk in session.model)


def losses(session: TrainingSession) -> list[float]:
    found = []
    for step in range(1, STEPS + 1):
        session.optimizer.zero_grad()
        found.append(session.runner.train(session.batches.step(step), step).lm_loss)
        session.optimizer.step(1e-2)
    evaluated = session.runner.evaluate(session.batches.step(1)).lm_loss
    session.optimizer.finish_gather()
    return [*found, evaluated]


def trained(words: Words, pp: int, late: bool) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Losses, parameters at the end, and the number of bucket groups of a rank."""
    groups = join(pp=pp)
    session = open_session(words, groups)
    count = delay_gathers(session) if late else 0
    found = losses(session)
    parameters = {p.name: p.param.detach().clone() for p in session.trained}
    destroy_groups()
    return found, parameters, count


@pytest.mark.parametrize(
    ("pp", "flags"),
    [
        (1, {}),
        (1, FULL_RECOMPUTE),
        (1, {"recompute_granularity": "selective"}),
        # The loss reads the output layer's weight, or the embedding's, without calling the module that holds it.
        (1, {"lora_r": None}),
        (1, {"lora_r": None, "tied": True}),
        (2, {"num_virtual_stages_per_pipeline_rank": 2, **FULL_RECOMPUTE}),
        (2, {"num_virtual_stages_per_pipeline_rank": 2, "lora_r": None, "tied": True}),
    ],
    ids=["adapter", "full", "selective", "all", "all-tied", "vpp-full", "vpp-all-tied"],
)
def test_no_parameter_is_read_before_its_gather_has_ended(
    workers: WorkerPool, tiny: Tiny, tiny_tied: Tiny, pp: int, flags: dict[str, Any]
) -> None:
    # Without clipping: the order in which the norm is summed depends on where buckets are cut.
    flags = {"global_batch_size": 4 * pp, "pipeline_model_parallel_size": pp, "clip_grad": 0.0, **flags}
    job = tiny_tied if flags.pop("tied", False) else tiny
    plain = workers.run(2 * pp, trained, job.words(use_distributed_optimizer=True, **flags), pp, False)
    words = job.words(**OVERLAP, ddp_bucket_size=2000, **flags)
    late = workers.run(2 * pp, trained, words, pp, True)
    assert max(count for _, _, count in late) > 1, "several gathers are under way at once"
    for (expected, parameters, _), (found, others, _) in zip(plain, late, strict=True):
        assert found == expected
        assert all(torch.equal(others[name], value) for name, value in parameters.items())


def with_megatron_hooks(words: Words) -> list[float]:
    """Losses with late gathers that are waited for where megatron-core's own hooks wait: at the module that holds
    a parameter."""
    groups = join()
    session = open_session(words, groups)
    delay_gathers(session)
    for chunk in session.model:
        for handle in chunk.remove_forward_pre_hook_handles.values():
            handle.remove()
        chunk.remove_forward_pre_hook_handles.clear()
        for module in chunk.module.modules():
            module.register_forward_pre_hook(
                lambda module, _inputs, chunk=chunk: chunk._wait_for(list(module.parameters(recurse=False)))
            )
    session.optimizer.zero_grad()
    session.runner.train(session.batches.step(1), 1)
    session.optimizer.step(1e-2)
    session.optimizer.zero_grad()
    loss = session.runner.train(session.batches.step(2), 2).lm_loss
    destroy_groups()
    return [loss]


def test_hooks_on_the_modules_that_hold_the_factors_would_be_too_late(
    workers: WorkerPool, tiny: Tiny
) -> None:
    """The mistake that others shipped is seen by the test above."""
    for found in workers.run(2, with_megatron_hooks, tiny.words(**OVERLAP, global_batch_size=4)):
        assert found[0] != found[0], "not a number"


def events_of_a_step(words: Words) -> list[list[str]]:
    """What happens in the second and third step: reductions that start, and the end of the backward pass."""
    groups = join()
    session = open_session(words, groups)
    happened: list[str] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            happened.append(name)
            return function(*args, **kwargs)

        return noted

    for chunk in session.model:
        for number, group in enumerate(chunk.bucket_groups):
            group.start_grad_sync = noting(f"reduce {number}", group.start_grad_sync)
    finalizer = session.config.finalize_model_grads_func
    session.config.finalize_model_grads_func = noting("backward ended", finalizer)
    found = []
    for step in range(1, STEPS + 1):
        happened.clear()
        session.optimizer.zero_grad()
        session.runner.train(session.batches.step(step), step)
        session.optimizer.step(1e-2)
        found.append(list(happened))
    destroy_groups()
    # In the first step megatron-core only learns which gradients come.
    return found[1:]


@pytest.mark.parametrize("recompute", [{}, FULL_RECOMPUTE], ids=["", "full"])
def test_each_bucket_is_reduced_once_while_the_backward_pass_goes_on(
    workers: WorkerPool, tiny: Tiny, recompute: dict[str, Any]
) -> None:
    """With four micro-batches: after the last one, not after each."""
    words = tiny.words(global_batch_size=8, overlap_grad_reduce=True, ddp_bucket_size=2000, **recompute)
    for steps in workers.run(2, events_of_a_step, words):
        for happened in steps:
            reductions = happened[: happened.index("backward ended")]
            assert len(happened) == len(reductions) + 1
            assert len(reductions) > 1
            assert sorted(reductions) == [f"reduce {number}" for number in range(len(reductions))]


def wrapped(words: Words) -> tuple[bool, bool, bool, int]:
    groups = join()
    session = open_session(words, groups)
    config = session.model[0].ddp_config
    found = (
        config.overlap_grad_reduce,
        config.overlap_param_gather,
        config.use_distributed_optimizer,
        len(session.model[0].bucket_groups),
    )
    destroy_groups()
    return found


def test_with_one_data_parallel_rank_nothing_overlaps(workers: WorkerPool, tiny: Tiny) -> None:
    assert workers.run(1, wrapped, tiny.words(**OVERLAP, ddp_bucket_size=100)) == [(False, False, False, 1)]
    assert workers.run(2, wrapped, tiny.words(**OVERLAP)) == [(True, True, True, 1)] * 2
