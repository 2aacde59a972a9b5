"""One optimizer step's forward and backward passes, and the passes of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from mindspeed_lora.adapters.dropout import token_keys
from mindspeed_lora.data.batch import Batch
from mindspeed_lora.device import current_device, release_freed_memory
from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.parallel.collectives import all_reduce_sum, broadcast
from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.training.experts import RouterLosses
from mindspeed_lora.training.gradients import GradientFinalizer
from mindspeed_lora.training.pipeline import Pipeline


@dataclass(frozen=True)
class StepLoss:
    """Loss and token counts of a global batch."""

    lm_loss: float
    """Mean over all loss-carrying tokens, each with its weight, or the mean of micro-batch means."""
    loss_tokens: int
    """Positions with a target."""
    tokens: int
    """Real tokens, without padding."""
    loss_weight: float = 0.0
    """The sum of the weights of these positions: their number where none has another weight than 1."""
    router_losses: Mapping[str, float] = field(default_factory=dict)
    """The routers' auxiliary losses by name."""


class StepRunner:
    """Runs the micro-batches of this rank through its chunks of the pipeline."""

    def __init__(
        self,
        model: Sequence[DistributedDataParallel],
        finalizer: GradientFinalizer,
        groups: ParallelGroups,
        mean_of_micro_batches: bool = False,
        dropout_seed: int | None = None,
        router_losses: RouterLosses | None = None,
    ) -> None:
        self.model = model
        """This rank's chunks."""
        self.finalizer = finalizer
        self.groups = groups
        self.mean_of_micro_batches = mean_of_micro_batches
        self.dropout_seed = dropout_seed
        """Of the adapters' dropout masks; None drops nothing."""
        self.pipeline = Pipeline(model, groups)
        self.router_losses = router_losses
        self._aux_loss_scale = 0.0

    def train(self, batches: Sequence[Batch], step: int) -> StepLoss:
        """Forward and backward of all micro-batches of step ``step``; leaves the complete gradient in the buffers.

        A global batch without any loss-carrying token computes nothing: ``loss_tokens`` is 0.
        """
        counts = self._count(batches)
        if counts.loss_tokens == 0:
            return StepLoss(0.0, 0, counts.tokens)
        normaliser = float(counts.micro_batches) if self.mean_of_micro_batches else counts.loss_weight
        self.finalizer.normaliser = normaliser
        self._aux_loss_scale = self._weight_of_aux_losses(normaliser, len(batches))
        for chunk in self.model:
            chunk.train()
        total = self._run(batches, self.mean_of_micro_batches, step)
        routers = {} if self.router_losses is None else self.router_losses.take(len(batches))
        return StepLoss(total / normaliser, counts.loss_tokens, counts.tokens, counts.loss_weight, routers)

    def evaluate(self, batches: Sequence[Batch]) -> StepLoss:
        """Mean loss per loss-carrying token of one global batch of evaluation rows, without gradients."""
        counts = self._count(batches)
        if counts.loss_tokens == 0:
            return StepLoss(0.0, 0, counts.tokens)
        for chunk in self.model:
            chunk.eval()
        with torch.no_grad():
            total = self._run(batches, mean_per_batch=False)
        return StepLoss(total / counts.loss_weight, counts.loss_tokens, counts.tokens, counts.loss_weight)

    def _run(self, batches: Sequence[Batch], mean_per_batch: bool, step: int | None = None) -> float:
        """Summed loss of the global batch, on every rank; without a step, no backward pass."""
        batches = [self._own_positions(batch) for batch in batches]
        outputs: list[torch.Tensor] = self.pipeline.run(
            partial(self._forward_step, mean_per_batch=mean_per_batch, step=step),
            batches,
            [(batch.tokens.size(1), batch.tokens.size(0)) for batch in batches],
            forward_only=step is None,
        )
        total = torch.zeros(1, dtype=torch.float64, device=current_device())
        for loss in outputs:
            total += loss.double()
        all_reduce_sum(total, self.groups.dp_cp_group)
        broadcast(total, self.groups.pp_group, source=self.groups.pp_size - 1)
        return float(total)

    def _own_positions(self, batch: Batch) -> Batch:
        """What this rank computes of a micro-batch that context parallelism cuts."""
        context = self.groups.context
        return batch if context.size == 1 else batch.at(context.positions(batch.tokens.size(1)))

    def _forward_step(
        self, batches: Iterator[Batch], chunk: DistributedDataParallel, mean_per_batch: bool, step: int | None
    ) -> tuple[torch.Tensor, Any]:
        release_freed_memory()
        batch = next(batches)
        device, by_length = current_device(), chunk.module.rotary.switch is not None
        output = chunk(
            batch.tokens.to(device, non_blocking=True),
            # The loss chooses its positions by them on the host.
            labels=batch.labels if chunk.module.post_process else None,
            loss_weights=batch.loss_weights if chunk.module.post_process else None,
            positions=batch.position_ids.to(device, non_blocking=True),
            lengths=batch.lengths.to(device, non_blocking=True) if by_length else None,
            context=self.context(batch, step),
        )
        divisor = (batch.sum_of_weights or 1.0) if mean_per_batch else 1.0
        return output, partial(_loss_terms, divisor=divisor)

    def context(self, batch: Batch, step: int | None) -> ForwardContext:
        """What the layers must know of a micro-batch; nothing is dropped outside of a training step."""
        keys = None
        if step is not None and self.dropout_seed is not None:
            samples, positions = batch.sample_ids.t(), batch.sample_positions.t()
            keys = token_keys(self.dropout_seed, step, samples, positions).to(current_device())
        aux_loss_scale = None if step is None else self._aux_loss_scale
        return ForwardContext(sub_rows=batch.sub_rows, token_keys=keys, aux_loss_scale=aux_loss_scale)

    def _weight_of_aux_losses(self, normaliser: float, micro_batches: int) -> float:
        """On the routers' losses, so that what is divided by the normaliser is their mean over all micro-batches.

        That is megatron-core's weight too (``MoEAuxLossAutoScaler``).
        """
        scale = self.model[0].config.grad_scale_func
        loss_scale = 1.0 if scale is None else float(scale(1.0))
        return loss_scale * normaliser / (micro_batches * self.groups.dp_size)

    def _count(self, batches: Sequence[Batch]) -> _Counts:
        """Counts over the global batch: every stage sees the same rows, so only DP is summed."""
        local = [
            sum(batch.num_loss_tokens for batch in batches),
            sum(batch.num_tokens for batch in batches),
            sum(batch.num_loss_tokens > 0 for batch in batches),
            sum(batch.sum_of_weights for batch in batches),
        ]
        # Whole numbers up to 2^53 are exact in float64.
        counts = torch.tensor(local, dtype=torch.float64, device=current_device())
        all_reduce_sum(counts, self.groups.dp_group)
        loss_tokens, tokens, micro_batches, loss_weight = counts.tolist()
        return _Counts(int(loss_tokens), int(tokens), int(micro_batches), loss_weight)


@dataclass(frozen=True)
class _Counts:
    loss_tokens: int
    tokens: int
    micro_batches: int
    """Those that carry loss."""
    loss_weight: float
    """The sum of the loss-carrying tokens' weights."""


def _loss_terms(loss: torch.Tensor, divisor: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What megatron-core's schedule wants of a loss: its sum, a token count, and what to report."""
    loss = loss / divisor if divisor != 1 else loss
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), loss.detach().reshape(1)
