"""The model chunks of a rank in megatron-core's data-parallel wrapper, and what of its communication overlaps.

``--overlap-grad-reduce``: a bucket is reduced as soon as the last micro-batch's backward pass has left all of its
gradients. ``--overlap-param-gather``: the gathers of the distributed optimizer's parameters start when the update is
done and end one by one, in front of the part of the model that reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.models.gpt import GPTModel
from mindspeed_lora.parallel.collectives import start_gather_shares
from mindspeed_lora.parallel.groups import ParallelGroups

_BUCKETS = 8
_SMALLEST_BUCKET = 1_000_000
"""Elements; smaller messages cost their latency."""


def wrap_chunks(
    chunks: Sequence[GPTModel], config: TransformerConfig, parallel: ParallelConfig, groups: ParallelGroups
) -> list[ChunkDataParallel]:
    """Wraps each chunk, and tells the pipeline schedule when gradients may travel.

    With one data-parallel rank there is nothing to cut and nothing to overlap.
    """
    several = groups.dp_cp_size > 1 or groups.experts.edp_size > 1
    overlap = parallel.overlap_grad_reduce and several
    model = [
        ChunkDataParallel(
            config=config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=parallel.use_distributed_optimizer and several,
                overlap_grad_reduce=overlap,
                overlap_param_gather=parallel.overlap_param_gather and several,
                bucket_size=parallel.ddp_bucket_size or _bucket_size(chunk),
            ),
            module=chunk,
        )
        for chunk in chunks
    ]
    if overlap:
        # Else the gradients of every micro-batch would be reduced, not only the sum that the last one completes.
        no_sync = [chunk.no_sync for chunk in model]
        config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
    return model


def _bucket_size(chunk: GPTModel) -> int:
    """Several buckets also for adapters, which are small: one alone would be reduced after the backward pass."""
    trained = sum(param.numel() for param in chunk.parameters() if param.requires_grad)
    return max(trained // _BUCKETS, _SMALLEST_BUCKET)


class ChunkDataParallel(DistributedDataParallel):
    """megatron-core's wrapper, which waits for a gather wherever a parameter may be read.

    Its own hooks wait for the parameters that a module holds itself when that module is called. An adapter's
    factors are read by the linear around them, and the output layer's weight by the loss: neither module is called,
    and they would be read before their gather has ended.
    """

    start_gather = staticmethod(start_gather_shares)

    def __init__(self, **options: Any) -> None:
        self._gathers: dict[Any, list[dist.Work]] = {}
        """Bucket groups whose parameters are on their way."""
        super().__init__(**options)

    def enable_forward_pre_hook(self) -> None:
        """Registers the waits: at each unit's first module for everything that the unit holds."""
        for module, parameters in _reading_units(self.module):
            waits = list(dict.fromkeys(parameters))
            self.remove_forward_pre_hook_handles[module] = module.register_forward_pre_hook(
                lambda *_call, waits=waits: self._wait_for(waits)
            )

    def gather_parameters(self) -> None:
        """Gathers the parameters that other data-parallel ranks have updated, or starts to.

        One operation a bucket: megatron-core coalesces those of a group, and gloo's coalesced gather corrupts the
        heap where other operations run beside it (pytorch/pytorch#65231; seen with torch 2.13).
        """
        # Buckets stand in the order of the backward pass.
        for group in reversed([*self.bucket_groups, *self.expert_parallel_bucket_groups]):
            self._gathers[group] = [
                self.start_gather(bucket.param_data, group.intra_distributed_optimizer_instance_group)
                for bucket in group.buckets
            ]
        if not self.ddp_config.overlap_param_gather:
            self.finish_gather()

    def finish_gather(self) -> None:
        """Waits until every parameter is whole."""
        self._wait_for(list(self.param_to_bucket_group))

    def _wait_for(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            for work in self._gathers.pop(self.param_to_bucket_group.get(parameter), ()):
                work.wait()


def _reading_units(gpt: GPTModel) -> Iterator[tuple[torch.nn.Module, list[torch.nn.Parameter]]]:
    """Modules, and the parameters that may be read from the moment at which each of them is called.

    The embedding, each layer, and for all that comes after the layers the final norm.
    """
    decoder: Any = gpt.decoder
    before = {id(parameter) for parameter in decoder.layers.parameters()}
    if gpt.pre_process:
        yield gpt.embedding, list(gpt.embedding.parameters())
        before |= {id(parameter) for parameter in gpt.embedding.parameters()}
    for layer in decoder.layers:
        yield layer, list(layer.parameters())
    if gpt.post_process:
        after = [parameter for parameter in gpt.parameters() if id(parameter) not in before]
        yield decoder.final_layernorm, after
