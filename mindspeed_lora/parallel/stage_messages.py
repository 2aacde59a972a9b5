"""What pipeline stages send each other, where micro-batches differ in length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer import TransformerConfig

HiddenSize = tuple[int, int]
"""Positions and rows ``(s, b)`` of a micro-batch's hidden states, as this rank holds them."""


class StageCommunicator(P2PCommunicator):
    """megatron-core's communicator for one step, which knows how long each micro-batch is.

    megatron-core's own sends the size of every tensor before it. All stages read the same rows, so none has to be
    told; and between two stages, where the next rank is the previous one too, those messages would be mixed up: the
    sizes of hidden states and of gradients travel in one batch and are matched by their order.

    Args:
        sizes: of each micro-batch, in order.
        num_chunks: model chunks of each pipeline rank.
    """

    def __init__(
        self,
        pp_group: dist.ProcessGroup,
        config: TransformerConfig,
        sizes: Sequence[HiddenSize],
        num_chunks: int,
    ) -> None:
        super().__init__(pp_group, config)
        # Every rank computes micro-batches and chunks in this order, forward and, with the chunks from behind,
        # backward; what it receives comes in this order too.
        order = get_schedule_table(len(sizes), num_chunks, config.microbatch_group_size_per_vp_stage)
        from_all = [sizes[micro_batch] for micro_batch, _ in order]
        # Nothing comes for the chunk that begins the pass.
        from_ends = [sizes[micro_batch] for micro_batch, chunk in order if chunk > 0]
        rank, size = dist.get_rank(pp_group), dist.get_world_size(pp_group)
        self._from_prev = iter(from_ends if rank == 0 else from_all)
        self._from_next = iter(from_ends if rank == size - 1 else from_all)

    def _communicate_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int], list[int]]:
        """Sizes of what the previous and the next rank are about to send; zeros where nothing comes."""
        return (
            self._shape(next(self._from_prev)) if recv_prev else [0, 0, 0],
            self._shape(next(self._from_next)) if recv_next else [0, 0, 0],
        )

    def _shape(self, size: HiddenSize) -> list[int]:
        return [*size, self.config.hidden_size]
