"""From the gradients of all micro-batches on all ranks to the gradient of the global batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel

from mindspeed_lora.checkpoint.local_parameters import LocalParameter
from mindspeed_lora.parallel.collectives import all_reduce_sum
from mindspeed_lora.parallel.groups import ParallelGroups


class GradientFinalizer:
    """Completes the fp32 gradients in ``param.main_grad`` after the last micro-batch of a step.

    In this order: the sum over data-parallel ranks, the sum of both copies of a tied embedding, one sum over TP
    of all gradients that are partial there, and the division by the step's normaliser.
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
        self.partial = [p.param for p in parameters if p.partial_over_tp]
        self.normaliser = 1.0
        """Loss-carrying tokens of the global batch; set by the step before its first micro-batch."""

    def __call__(self, *_schedule_arguments: object, **_schedule_options: object) -> None:
        """Called by megatron-core's schedule at the end of a step (``finalize_model_grads_func``)."""
        for chunk in self.model:
            chunk.finish_grad_sync()
        for param in self.shared:
            all_reduce_sum(param.main_grad, self.groups.embedding_group)  # type: ignore[attr-defined]
        self._sum_partial()
        for chunk in self.model:
            chunk.scale_gradients(1.0 / self.normaliser)

    def _sum_partial(self) -> None:
        """One all-reduce over TP for all gradients that are partial there."""
        if not self.partial:
            return
        gradients = [param.main_grad for param in self.partial]  # type: ignore[attr-defined]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        all_reduce_sum(flat, self.groups.tp_group)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
