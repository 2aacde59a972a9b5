"""AdamW in fp32 on the slices of the trainable parameters that this rank owns.

AdamW: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2. Without the distributed optimizer a rank owns
its parameters whole; with it (ZeRO stage 1, Rajbhandari et al. 2020) the part of megatron-core's gradient
buckets that the reduce-scatter leaves on it. State is kept per parameter, never per bucket, so that checkpoints
name it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mindspeed_lora.checkpoint.loading.local_parameters import LocalParameter
from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.device import current_device
from mindspeed_lora.device.paged_memory import paged_memory
from mindspeed_lora.parallel.collectives import all_reduce_sum
from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.training.data_parallel import ChunkDataParallel
from mindspeed_lora.training.loss_scale import LossScale
from mindspeed_lora.training.optimizer_states import (
    OptimizerStates,
    OwnedSlice,
    PagedStates,
    Portion,
    ResidentStates,
)


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did."""

    grad_norm: float
    """Global L2 norm before clipping; infinite or NaN after an overflow."""
    skipped: bool
    """Nothing was updated, because a gradient was not finite."""


class AdamW:
    """The optimizer of one rank."""

    def __init__(
        self,
        model: Sequence[ChunkDataParallel],
        parameters: Sequence[LocalParameter],
        training: TrainingConfig,
        groups: ParallelGroups,
        paging: Path | None = None,
    ) -> None:
        """With ``paging``, a folder, state lies in memory that pages: on the CPU in a file there.

        Raises:
            Failed: that folder has no room.
        """
        self.model = model
        """This rank's chunks."""
        self.groups = groups
        self.updates_done = 0
        """Updates made so far, without skipped steps (Adam's bias correction counts these)."""
        self.clip_grad = training.clip_grad
        self.loss_scale = LossScale(training)
        self.distributed: bool = model[0].ddp_config.use_distributed_optimizer
        owned = _owned_ranges(model, groups) if self.distributed else _whole_ranges(parameters)
        by_param = {id(p.param): p for p in parameters}
        ranges = [(by_param[id(param)], start, stop) for param, start, stop in owned if start < stop]
        self.states: OptimizerStates = (
            ResidentStates(ranges)
            if paging is None
            else PagedStates(ranges, lambda count: paged_memory(count, paging))
        )
        self.slices = self.states.slices
        decayed = [one.master for one in self.states.portions if _is_decayed(one.owned.parameter)]
        others = [one.master for one in self.states.portions if not _is_decayed(one.owned.parameter)]
        self.adam = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": training.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_eps,
            fused=True,
        )

    def zero_grad(self) -> None:
        """Clears the gradient buffers."""
        for chunk in self.model:
            chunk.zero_grad_buffer()

    def step(self, lr: float) -> StepOutcome:
        """Unscales, takes the norm, clips and updates; every rank's parameters are whole when next used.

        Clipping multiplies by ``min(1, max_norm / (norm + 1e-6))``.
        """
        norm = self._gradient_norm() / self.loss_scale.scale
        overflow = not math.isfinite(norm)
        scale = self.loss_scale.scale
        self.loss_scale.update(overflow)
        if overflow:
            return StepOutcome(norm, skipped=True)
        factor = 1.0 / scale
        if self.clip_grad > 0:
            factor *= min(1.0, self.clip_grad / (norm + 1e-6))
        gradients = [owned.gradient for owned in self.slices]
        if factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)
        for group in self.adam.param_groups:
            group["lr"] = lr
        for portions in self.states.windows(self.adam.state):
            for portion in portions:
                portion.master.grad = portion.gradient
            self.adam.step()
            _publish(portions)
        self.updates_done += 1
        self._gather()
        return StepOutcome(norm, skipped=False)

    def publish(self) -> None:
        """Copies the masters into the model's parameters, and gathers what other data-parallel ranks own.

        With ``--overlap-param-gather`` the gathers are under way when this returns.
        """
        for portions in self.states.windows(self.adam.state):
            _publish(portions)
        self._gather()

    def _gather(self) -> None:
        if self.distributed:
            for chunk in self.model:
                chunk.gather_parameters()

    def finish_gather(self) -> None:
        """Waits until the parameters that other data-parallel ranks own are here."""
        for chunk in self.model:
            chunk.finish_gather()

    def written_slices(self) -> list[OwnedSlice]:
        """The slices that this rank writes for all ranks that hold the same: every one has one writer."""
        if self.distributed:
            return self.slices
        return [owned for owned in self.slices if owned.parameter.copy_rank == 0]

    def _gradient_norm(self) -> float:
        """L2 norm over all trainable parameters of the unsharded model, each counted once."""
        gradients = [owned.gradient for owned in self.written_slices() if owned.parameter.counted]
        total = torch.zeros(1, dtype=torch.float64, device=current_device())
        if gradients:
            total += torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        all_reduce_sum(total, self.groups.world_group)
        return math.sqrt(float(total))

    def state_of(self, owned: OwnedSlice) -> dict[str, torch.Tensor]:
        """Master and both moments ``[stop − start]`` float32 of an owned slice; zeros before the first step."""
        return {"master": owned.master.data, **self.states.of(owned, self.adam.state)}

    def restore(self, owned: OwnedSlice, state: dict[str, torch.Tensor], updates_done: int) -> None:
        """Sets master and moments of an owned slice; :meth:`publish` makes the masters the model's values."""
        self.updates_done = updates_done
        self.states.restore(owned, state, updates_done, self.adam.state)


def _publish(portions: Sequence[Portion]) -> None:
    """Copies the masters into the parameters of other dtypes."""
    for portion in portions:
        portion.master.grad = None
    rounded = [portion for portion in portions if portion.owned.rounded]
    if rounded:
        torch._foreach_copy_(
            [portion.parameter_values for portion in rounded], [portion.master.data for portion in rounded]
        )


def _is_decayed(parameter: LocalParameter) -> bool:
    """Weight decay on all matrices, none on norms and biases, as Megatron-LM has it."""
    return len(parameter.shape) > 1


def _whole_ranges(parameters: Sequence[LocalParameter]) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    for parameter in parameters:
        yield parameter.param, 0, parameter.param.numel()


def _owned_ranges(
    model: Sequence[ChunkDataParallel], groups: ParallelGroups
) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """What the reduce-scatter of each bucket leaves on this data-parallel rank, per parameter."""
    experts = groups.experts
    dense = [(buffer, groups.dp_cp_size, groups.dp_cp_rank) for chunk in model for buffer in chunk.buffers]
    of_experts = [
        (buffer, experts.edp_size, experts.edp_rank)
        for chunk in model
        for buffer in chunk.expert_parallel_buffers
    ]
    for buffer, size, rank in dense + of_experts:
        for bucket in buffer.buckets:
            width = bucket.grad_data.numel() // size
            first = bucket.offset + rank * width
            for param in bucket.params_list:
                start, stop, _ = buffer.param_index_map[param]
                low, high = max(start, first), min(stop, first + width)
                yield param, low - start, max(low, high) - start
