"""Collectives outside of autograd: sums of scalars and gradients, objects, barriers.

The collectives inside of a layer, with their autograd duals, are megatron-core's ``tensor_parallel.mappings``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mindspeed_lora.parallel.groups import ParallelGroups

T = TypeVar("T")


def all_reduce_sum(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sums the tensor (any shape, in place) over the group, and returns it."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def all_reduce_max(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Takes the elementwise maximum over the group (in place), and returns it."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def broadcast(tensor: torch.Tensor, group: dist.ProcessGroup, source: int) -> torch.Tensor:
    """Copies the tensor of the group's rank ``source`` to all ranks of the group (in place)."""
    if dist.get_world_size(group) > 1:
        dist.broadcast(tensor, src=dist.get_global_rank(group, source), group=group)
    return tensor


def gather_objects(value: T, groups: ParallelGroups) -> list[T] | None:
    """The values of all ranks, in rank order, on rank 0; None elsewhere."""
    if groups.world_size == 1:
        return [value]
    gathered: list[Any] | None = [None] * groups.world_size if groups.is_main else None
    dist.gather_object(value, gathered, dst=0, group=groups.control_group)
    return gathered


def all_gather_objects(value: T, groups: ParallelGroups) -> list[T]:
    """The values of all ranks, in rank order, on every rank."""
    if groups.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * groups.world_size
    dist.all_gather_object(gathered, value, group=groups.control_group)
    return gathered


def broadcast_object(value: T, groups: ParallelGroups) -> T:
    """Rank 0's value on every rank."""
    if groups.world_size == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, group=groups.control_group)
    return box[0]


def barrier(groups: ParallelGroups) -> None:
    """Waits until every rank is here."""
    if groups.world_size > 1:
        dist.barrier(group=groups.control_group)


def together(groups: ParallelGroups, work: Callable[[], T]) -> T:
    """Runs ``work`` on every rank; where it fails on any, every rank raises the error of the lowest one.

    Without this the ranks that succeeded would wait in the next collective until the time-out. All ranks must
    call it, and ``work`` must not itself stand in a collective that a failing rank would not reach.

    Raises:
        PeerFailure: on the ranks whose own work went well.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    failures = all_gather_objects(str(error) if error is not None else None, groups)
    first = next((rank for rank, text in enumerate(failures) if text is not None), None)
    if first is None:
        return result  # type: ignore[return-value]
    if error is not None and groups.rank == first:
        raise error
    raise PeerFailure(first)


class PeerFailure(Exception):
    """Another rank failed and speaks for all; this one only leaves with the same status."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} failed")
        self.rank = rank
