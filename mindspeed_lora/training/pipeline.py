"""Micro-batches through the chunks of all pipeline stages, by megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection

from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.parallel.stage_messages import HiddenSize, StageCommunicator

ForwardStep = Callable[[Iterator[Any], DistributedDataParallel], tuple[Any, Callable[..., Any]]]
"""megatron-core's ``forward_step_func``: takes the next micro-batch for one chunk; its output and what becomes of
it."""


class Pipeline:
    """One stage, 1F1B over several, or interleaved 1F1B where each rank holds several chunks."""

    def __init__(self, model: Sequence[DistributedDataParallel], groups: ParallelGroups) -> None:
        self.model = list(model)
        self.groups = groups
        self.interleaved = len(self.model) > 1
        self._schedule = get_forward_backward_func(
            groups.pp_size, len(self.model) if self.interleaved else None
        )

    def run(
        self,
        forward_step: ForwardStep,
        micro_batches: Sequence[Any],
        sizes: Sequence[HiddenSize],
        forward_only: bool,
        collect_non_loss_data: bool = False,
    ) -> list[Any]:
        """What the last stage reports of each micro-batch, in order; empty on the other stages.

        ``sizes`` are positions and rows of each micro-batch on this rank, before sequence parallelism cuts them. A
        training step needs a number of micro-batches that the schedule takes (checked with the flags); an
        evaluation may have any.
        """
        surplus = 0
        if forward_only and self.interleaved:
            # The interleaved schedule takes multiples of the number of stages: the last one is repeated, unused.
            surplus = -len(micro_batches) % self.groups.pp_size
        rows = [*micro_batches, *surplus * [micro_batches[-1]]]
        outputs: list[Any] = self._schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(rows) for _ in self.model],
            model=self.model,
            num_microbatches=len(rows),
            # Unused: the communicator knows the size of each micro-batch.
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=collect_non_loss_data,
            **self._communication([*sizes, *surplus * [sizes[-1]]]),
        )
        return outputs[: len(micro_batches)]

    def _communication(self, sizes: Sequence[HiddenSize]) -> dict[str, Any]:
        """How stages talk in one pass; nothing where there is one."""
        if self.groups.pp_size == 1:
            return {}
        config = self.model[0].config
        cut = self.groups.tp_size if config.sequence_parallel else 1
        local = [(positions // cut, rows) for positions, rows in sizes]
        return {
            "p2p_communicator": StageCommunicator(self.groups.pp_group, config, local, len(self.model)),
            "pg_collection": ProcessGroupCollection.use_mpu_process_groups(),
        }
