"""Collectives in a world of one: each is a no-op, and an error is its own voice."""

from __future__ import annotations

import pytest
import torch

from mindspeed_lora.errors import Failed, Refused
from mindspeed_lora.parallel import collectives
from mindspeed_lora.parallel.groups import ParallelGroups


def test_sums_and_maxima_are_the_tensor_itself(groups: ParallelGroups) -> None:
    tensor = torch.tensor([1.0, -2.0])
    assert collectives.all_reduce_sum(tensor, groups.dp_group) is tensor
    assert collectives.all_reduce_max(tensor, groups.tp_group) is tensor
    assert collectives.broadcast(tensor, groups.pp_group, source=0) is tensor
    assert tensor.tolist() == [1.0, -2.0]


def test_no_group_is_nothing_to_sum() -> None:
    assert collectives.all_reduce_sum(torch.ones(1), None).item() == 1.0


def test_objects_stay_here(groups: ParallelGroups) -> None:
    value = {"a": 1}
    assert collectives.gather_objects(value, groups) == [value]
    assert collectives.all_gather_objects(value, groups) == [value]
    assert collectives.broadcast_object(value, groups) is value
    collectives.barrier(groups)


def test_together_gives_what_the_work_gives(groups: ParallelGroups) -> None:
    assert collectives.together(groups, lambda: 7) == 7
    assert collectives.together(groups, lambda: None) is None


def test_together_raises_the_work_s_own_error(groups: ParallelGroups) -> None:
    def work() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        collectives.together(groups, work)
    assert caught.value.errno == 28


def test_a_refusal_after_work_has_begun_is_a_failure(groups: ParallelGroups) -> None:
    def work() -> None:
        raise Refused("--save /x: cannot be written")

    with pytest.raises(Failed, match="^--save /x: cannot be written$"):
        collectives.together(groups, work)
