"""Collectives on tensors and objects; autograd knows nothing of them.

The adapters' autograd Functions call them themselves. Collectives that stand in a graph, with their duals, are
megatron-core's ``tensor_parallel.mappings``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mindspeed_lora.errors import Failed, PeerFailure, Refused
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


def start_all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup) -> dist.Work | None:
    """Begins to sum the tensor (any shape, in place) over the group; None where there is nothing to wait for."""
    if dist.get_world_size(group) == 1:
        return None
    return dist.all_reduce(tensor, group=group, async_op=True)


def start_gather_shares(whole: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Begins to fill ``[t · n]`` of every rank, in place: each has written its own share ``[n]``."""
    share = whole.chunk(dist.get_world_size(group))[dist.get_rank(group)]
    work = dist.all_gather_into_tensor(whole, share, group=group, async_op=True)
    assert work is not None
    return work


def gather_first_dim(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``[n, …]`` of every rank joined to ``[t · n, …]``; the dual of :func:`reduce_scatter_first_dim`."""
    if dist.get_world_size(group) == 1:
        return tensor
    whole, work = start_gather_first_dim(tensor, group)
    work.wait()
    return whole


def start_gather_first_dim(tensor: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, dist.Work]:
    """Begins :func:`gather_first_dim`: the tensor that is being filled, and what to wait for."""
    whole = tensor.new_empty(dist.get_world_size(group) * tensor.size(0), *tensor.shape[1:])
    work = dist.all_gather_into_tensor(whole, tensor.contiguous(), group=group, async_op=True)
    assert work is not None
    return whole, work


def reduce_scatter_first_dim(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's ``[n, …]`` of the sum of every rank's ``[t · n, …]``; the dual of :func:`gather_first_dim`."""
    size = dist.get_world_size(group)
    if size == 1:
        return tensor
    part = tensor.new_empty(tensor.size(0) // size, *tensor.shape[1:])
    start_reduce_scatter_first_dim(tensor, part, group)()
    return part


def start_reduce_scatter_first_dim(
    tensor: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup
) -> Callable[[], object]:
    """Begins :func:`reduce_scatter_first_dim` into ``part [n, …]``; what is returned waits for its end.

    gloo has no reduce-scatter of its own: torch sums everything on all ranks there, which sends twice as much. So
    each rank sends the others their rows, and adds what it gets to its own.
    """
    tensor = tensor.contiguous()
    if dist.get_backend(group) != "gloo":
        work = dist.reduce_scatter_tensor(part, tensor, group=group, async_op=True)
        assert work is not None
        return work.wait
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    parts = tensor.view(size, *part.shape)
    others = (
        parts[1:] if rank == 0 else torch.cat([parts[:rank], parts[rank + 1 :]]) if size > 2 else parts[:1]
    )
    received, exchange = start_exchange(others, group)

    def finish() -> None:
        exchange.wait()
        torch.add(parts[rank], received[0], out=part)
        for more in received[1:]:
            part.add_(more)

    return finish


def start_exchange(tensor: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, dist.Work]:
    """Begins to send ``[t − 1, …]`` to the other ranks, in their order, and to receive theirs, in the same order."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    counts = [0 if other == rank else 1 for other in range(size)]
    received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    work = dist.all_to_all_single(received, tensor.contiguous(), counts, counts, group=group, async_op=True)
    assert work is not None
    return received, work


def broadcast(tensor: torch.Tensor, group: dist.ProcessGroup, source: int) -> torch.Tensor:
    """Copies the tensor of the group's rank ``source`` to all ranks of the group (in place)."""
    if dist.get_world_size(group) > 1:
        dist.broadcast(tensor, src=dist.get_global_rank(group, source), group=group)
    return tensor


def send(tensor: torch.Tensor, group: dist.ProcessGroup, destination: int) -> None:
    """Sends a tensor (any shape) to the group's rank ``destination``; the dual of :func:`receive`."""
    dist.send(tensor.contiguous(), dst=dist.get_global_rank(group, destination), group=group)


def receive(tensor: torch.Tensor, group: dist.ProcessGroup, source: int) -> torch.Tensor:
    """Fills the tensor with what the group's rank ``source`` sends, and returns it."""
    dist.recv(tensor, src=dist.get_global_rank(group, source), group=group)
    return tensor


def all_to_all(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Part i of ``[n, …]`` goes to rank i of the n ranks of the group; returns theirs, by rank. Its own dual."""
    received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, tensor.contiguous(), group=group)
    return received


def start_all_to_all(
    tensor: torch.Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup
) -> tuple[torch.Tensor, dist.Work]:
    """Begins to send the next ``send[i]`` rows of ``[Σ send, …]`` to each rank i, and to receive ``receive[i]``.

    Returns the tensor ``[Σ receive, …]`` that is being filled, by rank, and what to wait for.
    """
    received = tensor.new_empty(sum(receive), *tensor.shape[1:])
    work = dist.all_to_all_single(
        received, tensor.contiguous(), list(receive), list(send), group=group, async_op=True
    )
    assert work is not None
    return received, work


class RingPass:
    """A tensor on its way to the group's next rank, while that of the previous one comes; begun at once.

    Every rank begins its passes in the same order. Passes under way at the same time differ in ``tag``.
    """

    def __init__(self, tensor: torch.Tensor, group: dist.ProcessGroup, tag: int = 0) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        following, previous = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
        self._sent = tensor.contiguous()
        self._received = torch.empty_like(self._sent)
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, following, group, tag),
                dist.P2POp(dist.irecv, self._received, previous, group, tag),
            ]
        )

    def wait(self) -> torch.Tensor:
        """What the previous rank sent. The tensor that was given may then be written again."""
        for work in self._works:
            work.wait()
        return self._received


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
    failed = all_gather_objects(error is not None, groups)
    if not any(failed):
        return result  # type: ignore[return-value]
    if error is None or groups.rank != failed.index(True):
        raise PeerFailure(failed.index(True))
    if isinstance(error, Refused):
        # Work has begun, and this rank must be heard: a refusal is the voice of rank 0 alone.
        raise Failed(str(error)) from error
    raise error
