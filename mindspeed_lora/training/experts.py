"""Experts of a job: what its flags say of them, how long their tokens travel, what their routers' losses were."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mindspeed_lora.adapters.schedules.choice import LARGEST_MESSAGE, measure, shortest_seconds
from mindspeed_lora.config.moe import RoutingConfig
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.device import current_device
from mindspeed_lora.models.moe.router import Router
from mindspeed_lora.models.moe.settings import MoESettings
from mindspeed_lora.parallel.collectives import all_reduce_sum, broadcast_object, start_all_to_all
from mindspeed_lora.parallel.groups import ParallelGroups


def expert_settings(routing: RoutingConfig) -> MoESettings:
    """The settings that every layer of experts of the job has."""
    coeff = routing.aux_loss_coeff
    return MoESettings(
        aux_loss_coeff=0.0 if routing.balances_rows else coeff,
        seq_aux_loss_coeff=coeff if routing.balances_rows else 0.0,
        z_loss_coeff=routing.moe_z_loss_coeff,
        router_fp32=routing.moe_router_dtype is not None or routing.router_gating_in_fp32,
        capacity_factor=routing.moe_expert_capacity_factor,
        drop_policy=routing.moe_token_drop_policy,
        recompute_activation=routing.moe_zero_memory != "disable",
    )


def exchange_share(
    shape: ModelShape, tokens: int, flops_per_token: float, groups: ParallelGroups, dtype: torch.dtype
) -> float:
    """How long tokens travel to experts and back in a training step, by how long the products take; by measuring.

    Of a rank's token each layer of experts sends ``4 · k · etp`` rows (there and back, forward and backward), of which
    one in P stays with the rank.

    Args:
        shape: of a model with experts that several ranks share.
        tokens: of a micro-batch, on this context-parallel rank.
        flops_per_token: of a training step, all layers.
        groups: all of whose ranks call it, and get the same.
        dtype: of the hidden states.
    """
    moe, experts, device = shape.moe, groups.experts, current_device()
    assert moe is not None and experts.group is not None
    copies, group = moe.topk * experts.etp_size, experts.group
    most = LARGEST_MESSAGE // (shape.hidden_size * dtype.itemsize)
    rows = max(1, min(tokens // groups.tp_size * copies, most) // experts.size)
    message = torch.zeros(rows * experts.size, shape.hidden_size, dtype=dtype, device=device)
    counts = [rows] * experts.size

    def exchange() -> None:
        start_all_to_all(message, counts, counts, group)[1].wait()

    took = broadcast_object(shortest_seconds(exchange, device), groups)
    layers = sum(map(shape.has_experts, range(shape.num_layers)))
    travelling = 4 * copies * layers * took / message.size(0)
    speeds = measure(tokens, shape.hidden_size, dtype, device, groups)
    return travelling * speeds.flops / flops_per_token


class RouterLosses:
    """The auxiliary losses of all routers, for the report of a step."""

    def __init__(
        self, chunks: Sequence[torch.nn.Module], groups: ParallelGroups, settings: MoESettings
    ) -> None:
        self.groups = groups
        self.routers = [
            module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)
        ]
        self.coefficients = {
            name: coefficient
            for name, coefficient in (
                ("load_balancing_loss", settings.aux_loss_coeff),
                ("seq_load_balancing_loss", settings.seq_aux_loss_coeff),
                ("z_loss", settings.z_loss_coeff),
            )
            if coefficient > 0
        }

    def take(self, micro_batches: int) -> dict[str, float]:
        """Mean over layers and the step's micro-batches of each loss, without its coefficient; every rank calls it.

        ``micro_batches`` are those of one data-parallel rank.
        """
        if not self.coefficients:
            return {}
        found = [router.take_losses() for router in self.routers]
        sums = torch.zeros(1 + len(self.coefficients), dtype=torch.float64, device=current_device())
        sums[0] = len(self.routers)
        for place, name in enumerate(self.coefficients, start=1):
            for losses in found:
                sums[place] += losses[name].double() if name in losses else 0.0
        count, *totals = all_reduce_sum(sums, self.groups.world_group).tolist()
        # Ranks of a stage have the same routers, and each a part of the loss of its micro-batches.
        layers = count * self.groups.pp_size / self.groups.world_size
        if layers == 0:
            return {}
        micro_batches *= self.groups.dp_size
        return {
            name: total / (coefficient * layers * micro_batches)
            for (name, coefficient), total in zip(self.coefficients.items(), totals, strict=True)
        }
