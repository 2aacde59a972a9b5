"""Experts of a job: what its flags say of their computation, and what their routers' losses were."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mindspeed_lora.config.moe import RoutingConfig
from mindspeed_lora.device import current_device
from mindspeed_lora.models.moe.router import Router
from mindspeed_lora.models.moe.settings import MoESettings
from mindspeed_lora.parallel.collectives import all_reduce_sum
from mindspeed_lora.parallel.groups import ParallelGroups


def expert_settings(routing: RoutingConfig) -> MoESettings:
    """The settings that every layer of experts of the job has."""
    coeff = routing.aux_loss_coeff
    return MoESettings(
        aux_loss_coeff=0.0 if routing.balances_rows else coeff,
        seq_aux_loss_coeff=coeff if routing.balances_rows else 0.0,
        z_loss_coeff=routing.moe_z_loss_coeff,
        router_fp32=routing.moe_router_dtype is not None,
        capacity_factor=routing.moe_expert_capacity_factor,
        drop_policy=routing.moe_token_drop_policy,
        recompute_activation=routing.moe_zero_memory != "disable",
    )


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
