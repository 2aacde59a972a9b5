"""Out of memory: what grew, and the cheapest flag with which the run is predicted to fit."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mindspeed_lora.checkpoint.loading.quantization import plan_quantization
from mindspeed_lora.device import compute_dtype
from mindspeed_lora.errors import Failed, Refused
from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.parallel.heartbeat import Heartbeat
from mindspeed_lora.training.dry_run import memory_question
from mindspeed_lora.training.layer_memory import MemoryQuestion
from mindspeed_lora.training.memory import RankMemory, predict_memory
from mindspeed_lora.training.plan import TrainPlan

_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
_MARGIN = 0.95
_IN_A_STEP = ("activations", "logits", "buffers")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the host or the device has no more memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


@contextmanager
def memory_errors_told(
    plan: TrainPlan, groups: ParallelGroups, heartbeat: Heartbeat, free: int
) -> Iterator[None]:
    """An allocator's error inside becomes the sentence of :func:`out_of_memory`; ``free`` as there.

    Raises:
        Failed: in its place.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        training = plan.job.training
        dtype, _ = compute_dtype(training.bf16, training.fp16)
        raise out_of_memory(
            plan, groups.world_size, groups.pp_rank, dtype.itemsize, heartbeat.phase, heartbeat.step, free
        ) from error


def out_of_memory(
    plan: TrainPlan, world_size: int, pp_rank: int, itemsize: int, phase: str, step: int | None, free: int
) -> Failed:
    """The one sentence: the part that grew, what is there, and what to change.

    Args:
        plan: the job.
        world_size: its processes.
        pp_rank: pipeline stage of the rank that ran out.
        itemsize: bytes of an element in the dtype that is computed in.
        phase: what it was doing, as the heartbeat has it; ``step`` its step, if any.
        free: what it might have taken when it began.
    """
    question = memory_question(plan, world_size, itemsize)
    now = predict_memory(question, pp_rank)
    part = _part_that_grew(now, phase)
    where = f"in step {step}, {phase}" if step is not None else f"while {phase}"
    what = (
        f"out of memory {where}: {part} take {_gib(now.parts[part])} of the {_gib(now.total)} that are predicted for "
        f"a rank, and {_gib(free)} were free"
    )
    advice = _advice(plan, question, pp_rank, now.total, free)
    return Failed(f"{what}; {advice}; the last checkpoint is whole")


def _part_that_grew(memory: RankMemory, phase: str) -> str:
    if phase.startswith("building"):
        return "weights"
    if phase.startswith("optimizer"):
        return "optimizer"
    return max(_IN_A_STEP, key=lambda name: memory.parts[name])


def _advice(plan: TrainPlan, question: MemoryQuestion, pp_rank: int, total: int, free: int) -> str:
    """The first flag, in the order of what they cost, that is predicted to fit; else the one that saves most."""
    found = [(words, predict_memory(changed, pp_rank).total) for words, changed in _changes(plan, question)]
    found = [(words, size) for words, size in found if size < total]
    # What did not fit may have been predicted to: the prediction is then too low for the others as well.
    most = min(free, total) * _MARGIN
    for words, size in found:
        if size <= most:
            return f"{words} brings that to {_gib(size)}"
    if not found:
        return "start more processes with a higher --tensor-model-parallel-size"
    words, size = min(found, key=lambda entry: entry[1])
    return f"no single flag is predicted to fit: {words} saves most, and leaves {_gib(size)}"


def _changes(plan: TrainPlan, question: MemoryQuestion) -> Iterator[tuple[str, MemoryQuestion]]:
    """Flags that lower the peak, the cheapest in time first, with the job that they make."""
    training = question.training

    def trained(**values: Any) -> MemoryQuestion:
        return dataclasses.replace(question, training=dataclasses.replace(training, **values))

    if question.tp > 1 and not question.sequence_parallel:
        yield "--sequence-parallel", dataclasses.replace(question, sequence_parallel=True)
    if question.dp > 1 and not question.distributed_optimizer:
        yield "--use-distributed-optimizer", dataclasses.replace(question, distributed_optimizer=True)
    size = training.micro_batch_size // 2
    while size:
        if training.global_batch_size % (size * question.dp) == 0:
            yield f"--micro-batch-size {size}", trained(micro_batch_size=size)
        size //= 2
    if training.recompute_granularity is None:
        yield (
            "--recompute-granularity selective",
            trained(recompute_granularity="selective"),
        )
    full = {"recompute_method": "uniform", "recompute_num_layers": 1}
    if training.recompute_granularity != "full":
        yield "--recompute-granularity full", trained(recompute_granularity="full", **full)
    if not training.paged_optimizer:
        yield "--paged-optimizer", trained(paged_optimizer=True)
    yield from _quantised(plan, question)
    if training.recompute_granularity != "full":
        smallest = trained(recompute_granularity="full", micro_batch_size=1, **full)
        yield "--micro-batch-size 1 --recompute-granularity full", smallest
        for words, changed in _quantised(plan, smallest):
            yield f"{words} --micro-batch-size 1 --recompute-granularity full", changed
    shorter = question.seq_length // 2
    if shorter:
        yield f"--seq-length {shorter}", dataclasses.replace(question, seq_length=shorter)


def _quantised(plan: TrainPlan, question: MemoryQuestion) -> Iterator[tuple[str, MemoryQuestion]]:
    if question.quantization is not None or plan.adapter is None:
        return
    flags = dataclasses.replace(plan.job.quantization, qlora=True)
    try:
        quantization = plan_quantization(flags, plan.source, plan.shape, plan.adapter.spec)
    except Refused:
        return
    yield "--qlora", dataclasses.replace(question, quantization=quantization)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 29 else f"{size / 2**20:.0f} MiB"
