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

import torch

from mindspeed_lora.checkpoint.loading.local_parameters import LocalParameter
from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.device import current_device
from mindspeed_lora.parallel.collectives import all_reduce_sum
from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.training.data_parallel import ChunkDataParallel
from mindspeed_lora.training.loss_scale import LossScale

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OwnedSlice:
    """Elements ``[start, stop)`` of a flattened local parameter, and their fp32 master copy."""

    parameter: LocalParameter
    start: int
    stop: int
    master: torch.nn.Parameter
    """``[stop − start]`` float32; the parameter's own storage where that is float32."""

    @property
    def gradient(self) -> torch.Tensor:
        """``[stop − start]`` float32, a view of the gradient buffer."""
        main_grad: torch.Tensor = self.parameter.param.main_grad  # type: ignore[attr-defined]
        return main_grad.view(-1)[self.start : self.stop]


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
    ) -> None:
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
        self.slices = [_own(by_param[id(param)], start, stop) for param, start, stop in owned if start < stop]
        decayed = [s.master for s in self.slices if _is_decayed(s.parameter)]
        others = [s.master for s in self.slices if not _is_decayed(s.parameter)]
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
        for owned, gradient in zip(self.slices, gradients, strict=True):
            owned.master.grad = gradient
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.updates_done += 1
        self.publish()
        return StepOutcome(norm, skipped=False)

    def publish(self) -> None:
        """Copies the masters into the model's parameters, and gathers what other data-parallel ranks own.

        With ``--overlap-param-gather`` the gathers are under way when this returns.
        """
        rounded = [owned for owned in self.slices if owned.parameter.param.dtype is not torch.float32]
        with torch.no_grad():
            for owned in self.slices:
                owned.master.grad = None
            if rounded:
                torch._foreach_copy_(
                    [owned.parameter.param.data.view(-1)[owned.start : owned.stop] for owned in rounded],
                    [owned.master for owned in rounded],
                )
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
        state = self.adam.state.get(owned.master, {})
        moments = {
            key: state[key] if key in state else torch.zeros_like(owned.master.data) for key in MOMENTS
        }
        return {"master": owned.master.data, **moments}

    def restore(self, owned: OwnedSlice, state: dict[str, torch.Tensor], updates_done: int) -> None:
        """Sets master and moments of an owned slice; :meth:`publish` makes the masters the model's values."""
        self.updates_done = updates_done
        with torch.no_grad():
            owned.master.copy_(state["master"])
        device = owned.master.device
        self.adam.state[owned.master] = {
            "step": torch.tensor(float(updates_done), device=device),
            **{key: state[key].to(device=device, dtype=torch.float32).clone() for key in MOMENTS},
        }


def _is_decayed(parameter: LocalParameter) -> bool:
    """Weight decay on all matrices, none on norms and biases, as Megatron-LM has it."""
    return len(parameter.shape) > 1


def _own(parameter: LocalParameter, start: int, stop: int) -> OwnedSlice:
    values = parameter.param.data.view(-1)[start:stop]
    master = values if values.dtype is torch.float32 else values.float().clone()
    return OwnedSlice(parameter, start, stop, torch.nn.Parameter(master))


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
