"""A few transformer layers with adapters on this TP rank, and one training step of them under any schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from comparison.sizes import Sizes
from mindspeed_lora.adapters.lora import (
    ColumnParallelLora,
    LoraPart,
    ParallelLoraLinear,
    RowParallelLora,
)
from mindspeed_lora.adapters.schedules import SchedulePlan
from mindspeed_lora.adapters.schedules.choice import FusionRequest, Scheduler, measure
from mindspeed_lora.adapters.side_branch import RowBlock
from mindspeed_lora.checkpoint.loading.model import build_model
from mindspeed_lora.checkpoint.loading.random_weights import RandomSource
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.models.layer import TransformerLayer
from mindspeed_lora.models.rope import rotary_tables
from mindspeed_lora.models.transformer_config import transformer_config
from mindspeed_lora.parallel.collectives import gather_first_dim, reduce_scatter_first_dim
from mindspeed_lora.parallel.groups import ParallelGroups


@dataclass(frozen=True)
class Way:
    """How the linears run."""

    name: str
    request: FusionRequest | None = None
    """None: unfused."""
    interleave: str | None = None


class FusedLayers:
    """The layers of one rank under TP with SP, their input and the gradient of their output."""

    def __init__(self, sizes: Sizes, groups: ParallelGroups) -> None:
        self.sizes, self.groups = sizes, groups
        parallel = ParallelConfig(tensor_model_parallel_size=groups.tp_size, sequence_parallel=True)
        config = transformer_config(sizes.shape, parallel, groups, torch.float32)
        model, _ = build_model(sizes.shape, config, groups, RandomSource(sizes.shape, 1, 0.02))
        model.requires_grad_(False)
        self.decoder: Any = model.decoder
        for layer in self.decoder.layers:
            for parent in (layer.self_attention, layer.mlp):
                for name, child in list(parent.named_children()):
                    if name.startswith("linear_"):
                        setattr(parent, name, self._with_adapter(child))
        self.linears = [
            (name.rpartition(".")[2], module)
            for name, module in self.decoder.named_modules()
            if isinstance(module, ParallelLoraLinear)
        ]
        size = (sizes.seq_length // groups.tp_size, sizes.micro_batch_size, sizes.hidden_size)
        generator = torch.Generator().manual_seed(groups.tp_rank)
        self.x = torch.randn(size, generator=generator).requires_grad_()
        self.grad = torch.randn(size, generator=generator)
        self.rotary = rotary_tables(model.rotary.frequencies, torch.arange(sizes.seq_length), torch.float32)

    def _with_adapter(self, base: Any) -> ParallelLoraLinear:
        weight = base.weight
        part = LoraPart(
            self.sizes.rank, weight.size(1), RowBlock(0, weight.size(0)), 2.0, weight.dtype, weight.device
        )
        torch.nn.init.normal_(part.lora_a, std=0.02)
        torch.nn.init.normal_(part.lora_b, std=0.02)
        kind = ColumnParallelLora if isinstance(base, ColumnParallelLinear) else RowParallelLora
        return kind(base, [part], 0.0, True, self.groups.tp_group)

    def choose(self, way: Way) -> dict[str, SchedulePlan]:
        """The plan of each kind of linear, by the link as it is now; all ranks call it."""
        scheduler = Scheduler()
        if way.request is not None:
            tokens = self.sizes.tokens // (2 if way.interleave else 1)
            width, device = self.sizes.hidden_size, torch.device("cpu")
            scheduler = Scheduler(
                way.request,
                tokens=tokens,
                tp=self.groups.tp_size,
                sequence_parallel=True,
                speeds=measure(tokens, width, torch.float32, device, self.groups),
            )
        plans = {}
        for name, linear in self.linears:
            base: Any = linear.base_layer
            column = isinstance(base, ColumnParallelLinear)
            plans[name] = scheduler.plan(name, base.weight, column, self.sizes.rank)
        return plans

    def use(self, plans: dict[str, SchedulePlan], interleave: str | None) -> None:
        """Lets every linear of a kind run its plan."""
        for name, linear in self.linears:
            linear.use(plans[name])
        self.set_interleave(interleave)

    def set_interleave(self, interleave: str | None) -> None:
        """Of every layer."""
        for layer in self.decoder.layers:
            assert isinstance(layer, TransformerLayer)
            layer.interleave = interleave

    def step(self) -> None:
        """Forward, backward, and the sum of the factors' gradients that are partial over TP."""
        hidden = self.x
        for layer in self.decoder.layers:
            hidden, _ = layer(hidden, rotary_pos_emb=self.rotary, packed_seq_params=ForwardContext())
        hidden.backward(self.grad)
        factors = [factor for _, linear in self.linears for factor in linear.parts.parameters()]
        partial = [f.grad for f in factors if f.grad is not None and getattr(f, "partial_over_tp", False)]
        if partial:
            dist.all_reduce(torch.cat([grad.flatten() for grad in partial]), group=self.groups.tp_group)
        for tensor in (self.x, *factors):
            tensor.grad = None

    def communicate(self) -> None:
        """The base's own collectives alone, one after the other: four gathers and four reduce-scatters a layer."""
        local = self.x.detach()
        whole = local.new_zeros(self.sizes.seq_length, *local.shape[1:])
        for _ in self.decoder.layers:
            for _ in range(4):
                gather_first_dim(local, self.groups.tp_group)
                reduce_scatter_first_dim(whole, self.groups.tp_group)

    @property
    def bytes_sent(self) -> int:
        """By one rank in :meth:`communicate`."""
        per_collective = (self.groups.tp_size - 1) * self.x.numel() * self.x.element_size()
        return 8 * self.sizes.layers * per_collective
