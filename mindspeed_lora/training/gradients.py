"""From the gradients of all micro-batches on all ranks to the gradient of the global batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from mindspeed_lora.checkpoint.loading.local_parameters import LocalParameter
from mindspeed_lora.parallel.collectives import all_reduce_sum
from mindspeed_lora.parallel.groups import ParallelGroups


class GradientFinalizer:
    """Completes the fp32 gradients in ``param.main_grad`` after the last micro-batch of a step.

    In this order: the sum over data-parallel ranks (for an expert's parameters over the ranks that hold the same
    part of the same expert), the sum of both copies of a tied embedding, one sum over TP of all gradients that are
    partial there, the same over ETP and EP, and the division by the step's normaliser.
    """

    def __init__(
        self,
        model: Sequence[DistributedDataParallel],
        parameters: Sequence[LocalParameter],
        groups: ParallelGroups,
    ) -> None:
        self.model = model
        """This rank's chunks."""
        self.groups = groups
        self.shared = [p.param for p in parameters if p.shared_embedding]
        experts = groups.experts
        self.partial = [
            ([p.param for p in parameters if p.partial_over_tp], groups.tp_group),
            ([p.param for p in parameters if p.partial_over_etp], experts.etp_group),
            ([p.param for p in parameters if p.partial_over_ep], experts.ep_group),
        ]
        """Parameters whose gradients are partial sums, and the ranks that hold the other parts."""
        self.normaliser = 1.0
        """Loss-carrying tokens of the global batch; set by the step before its first micro-batch."""

    def __call__(self, *_schedule_arguments: object, **_schedule_options: object) -> None:
        """Called by megatron-core's schedule at the end of a step (``finalize_model_grads_func``)."""
        for chunk in self.model:
            chunk.finish_grad_sync()
        for param in self.shared:
            all_reduce_sum(param.main_grad, self.groups.embedding_group)  # type: ignore[attr-defined]
        for partial, group in self.partial:
            _sum_partial(partial, group)
        for chunk in self.model:
            chunk.scale_gradients(1.0 / self.normaliser)


def _sum_partial(parameters: Sequence[torch.nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """One all-reduce for all gradients that are partial over a group."""
    if not parameters:
        return
    gradients = [param.main_grad for param in parameters]  # type: ignore[attr-defined]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    all_reduce_sum(flat, group)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
