"""The layouts that a training on so many GPUs could have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from mindspeed_lora.config.checks import check_layout
from mindspeed_lora.config.context import check_context, check_fixed_length
from mindspeed_lora.config.jobs import LayoutPlanJob
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.config.stages import LayerPlacement
from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.errors import Refused

_SHORTEST_CUT = 1024
"""Tokens of a row that a context-parallel rank should keep at least."""
_MICRO_BATCHES = (1, 2, 4, 8, 16)
_VIRTUAL_STAGES = (1, 2, 4)


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism with the layers of each stage."""

    parallel: ParallelConfig
    placement: LayerPlacement
    dp: int

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return self.parallel.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return self.parallel.pipeline_model_parallel_size

    @property
    def cp(self) -> int:
        """Context-parallel size."""
        return self.parallel.context_parallel_size


@dataclass(frozen=True)
class Candidate:
    """A layout with its micro-batch and what is computed again in the backward pass."""

    layout: Layout
    training: TrainingConfig

    @property
    def recompute(self) -> str:
        """In a word or two."""
        training = self.training
        if training.recompute_method == "block":
            return f"{training.recompute_num_layers} a stage"
        return training.recompute_granularity or "none"


def layouts(job: LayoutPlanJob, shape: ModelShape) -> Iterator[Layout]:
    """Every layout of the GPUs whose degrees divide what they cut."""
    gpus, per_node = job.machine.gpus or 1, job.machine.gpus_per_node
    for tp in _powers(min(gpus, per_node)):
        for cp in _powers(min(gpus // tp, max(1, job.plan.seq_length // _SHORTEST_CUT))):
            for pp in range(1, min(gpus // (tp * cp), shape.num_layers) + 1):
                if gpus % (tp * cp * pp):
                    continue
                for flags in _further(shape, tp, pp, gpus):
                    yield from _valid(job, shape, gpus, {"tp": tp, "pp": pp, "cp": cp, **flags})


def candidates(job: LayoutPlanJob, layout: Layout) -> Iterator[list[Candidate]]:
    """For each micro-batch from small to large the ways to compute again, from none to all."""
    batch = job.plan.global_batch_size
    for micro_batch in _MICRO_BATCHES:
        rows = micro_batch * layout.dp
        if batch % rows or (layout.placement.vp_size > 1 and batch // rows % layout.pp):
            continue
        chunk = max(map(len, layout.placement.chunks))
        ways: list[dict[str, str | int]] = [{}, {"recompute_granularity": "selective"}]
        if chunk > 1:
            ways.append(_full("block", chunk // 2))
        ways.append(_full("uniform", 1))
        yield [Candidate(layout, _training(batch, micro_batch, **way)) for way in ways]


def _full(method: str, layers: int) -> dict[str, str | int]:
    return {
        "recompute_granularity": "full",
        "recompute_method": method,
        "recompute_num_layers": layers,
    }


@cache
def _training(batch: int, micro_batch: int, **way: Any) -> TrainingConfig:
    """The same object for all layouts: making one checks all its fields."""
    return TrainingConfig(micro_batch_size=micro_batch, global_batch_size=batch, bf16=True, **way)


def _powers(largest: int) -> Iterator[int]:
    """1, 2, 4 … up to a number."""
    return (2**power for power in range(int(math.log2(largest)) + 1))


def _further(shape: ModelShape, tp: int, pp: int, gpus: int) -> Iterator[dict[str, int]]:
    """Virtual stages, and ranks that share experts or each of them."""
    sizes = [1] if shape.moe is None else [n for n in _powers(gpus) if shape.moe.num_experts % n == 0]
    for vp in _VIRTUAL_STAGES if pp > 1 and shape.num_layers % pp == 0 else (1,):
        for ep in sizes:
            for etp in {1, tp} if shape.moe is not None else {tp}:
                yield {"vp": vp, "ep": ep, "etp": etp}


def _valid(job: LayoutPlanJob, shape: ModelShape, gpus: int, size: dict[str, int]) -> Iterator[Layout]:
    """The layout of these sizes, where it can be."""
    tp, pp = size["tp"], size["pp"]
    replicas = gpus // (tp * pp * size["cp"])
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=size["cp"],
        expert_model_parallel_size=size["ep"],
        expert_tensor_parallel_size=None if size["etp"] == tp else size["etp"],
        num_virtual_stages_per_pipeline_rank=size["vp"],
        num_layer_list=None if shape.num_layers % pp == 0 else _uneven(shape.num_layers, pp),
        sequence_parallel=tp > 1,
        use_distributed_optimizer=replicas * size["cp"] > 1,
    )
    try:
        placement = check_layout(shape, parallel)
        check_context(shape, parallel)
        check_fixed_length(parallel, job.plan.seq_length)
        yield Layout(parallel, placement, parallel.data_parallel_size(gpus))
    except Refused:
        return


def _uneven(layers: int, pp: int) -> str:
    """Stages as even as can be; the last ones, which hold the output layer too, have fewer layers."""
    small, larger = divmod(layers, pp)
    return ",".join(str(small + (stage < larger)) for stage in range(pp))
