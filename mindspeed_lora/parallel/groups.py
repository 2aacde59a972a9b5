"""The process groups of a job and this rank's place in them, read once at start-up."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mindspeed_lora.config.launcher import check_ranks
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.device import bind_device, communication_backend
from mindspeed_lora.errors import Failed
from mindspeed_lora.parallel.attempt import store_of_attempt
from mindspeed_lora.parallel.context import ContextParallel, context_parallel
from mindspeed_lora.parallel.experts import ExpertParallel, expert_parallel


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """Sizes, ranks and groups of every parallel dimension."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    """Which rows of a global batch this rank computes, alone or with its context-parallel peers."""
    dp_size: int
    dp_cp_rank: int
    dp_cp_size: int
    context: ContextParallel
    experts: ExpertParallel
    tp_group: dist.ProcessGroup
    tp_cp_group: dist.ProcessGroup
    """All ranks that hold tokens of the same rows, TP × CP."""
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    """The ranks that compute other rows, at the same place in them."""
    dp_cp_group: dist.ProcessGroup
    """All ranks that hold the same part of the model, DP × CP: gradients are summed over it."""
    model_group: dist.ProcessGroup
    """All ranks that hold parts of the same replica: TP × PP."""
    world_group: dist.ProcessGroup
    """All ranks, on the device."""
    embedding_group: dist.ProcessGroup | None
    """First and last stage, where tied embeddings are held twice."""
    control_group: dist.ProcessGroup
    """All ranks over gloo: objects and barriers that must not touch the device."""
    timeout: timedelta

    @property
    def is_first_stage(self) -> bool:
        """True where the token embedding lives."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True where the output layer and the loss live."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_main(self) -> bool:
        """True on the rank that speaks and writes for all."""
        return self.rank == 0


def initialize_groups(parallel: ParallelConfig, seed: int) -> tuple[ParallelGroups, list[str]]:
    """Joins the job's processes, unless they have joined already, and makes its groups.

    Without a launcher the world is this one process. ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and
    ``MASTER_PORT`` are enough. Returns the groups, and notices for the user.

    Raises:
        Failed: the other processes cannot be reached within the time-out.
    """
    device = bind_device()
    backend, notice = communication_backend(parallel.distributed_backend)
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    _join(backend, timeout, device)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        # megatron-core makes a timedelta of it, which takes a fraction; an int would make 0.5 a time-out of 0.
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        create_gloo_process_groups=False,
    )
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
    assert control is not None
    context = context_parallel(parallel, parallel_state.get_context_parallel_group())
    return _read_groups(control, context, timeout), [notice] if notice else []


def _join(backend: str, timeout: timedelta, device: torch.device) -> None:
    if dist.is_initialized():
        return
    check_ranks(os.environ)
    address = os.environ.get("MASTER_ADDR", "localhost")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        if world_size == 1 and "MASTER_PORT" not in os.environ:
            dist.init_process_group(
                backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1, timeout=timeout
            )
        else:
            rank = int(os.environ.get("RANK", "0"))
            device_id = device if backend == "nccl" else None
            dist.init_process_group(
                backend,
                store=store_of_attempt(timeout),
                rank=rank,
                world_size=world_size,
                timeout=timeout,
                device_id=device_id,
            )
    except (RuntimeError, ValueError) as error:
        raise Failed(
            f"could not join {world_size} processes at MASTER_ADDR={address} "
            f"MASTER_PORT={os.environ.get('MASTER_PORT')} within {timeout.total_seconds() / 60:g} minutes "
            f"({str(error).splitlines()[0]}); check that all were started with the same address and port"
        ) from error


def _read_groups(control: dist.ProcessGroup, context: ContextParallel, timeout: timedelta) -> ParallelGroups:
    assert dist.group.WORLD is not None
    return ParallelGroups(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_cp_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        dp_cp_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        context=context,
        experts=expert_parallel(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        tp_cp_group=parallel_state.get_tensor_and_context_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        model_group=parallel_state.get_model_parallel_group(),
        world_group=dist.group.WORLD,
        embedding_group=parallel_state.get_embedding_group(check_initialized=False),
        control_group=control,
        timeout=timeout,
    )


def destroy_groups() -> None:
    """Leaves the job; for tests that make groups anew in the same processes, and at a clean end."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
