"""``--dry-run``: the job is resolved as for a training, without weights, and told with the memory that it will take.

It needs no launcher and no input that is not there: what a flag names and cannot be found is taken from the other
flags, and told. Nothing is written.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping

from mindspeed_lora.checkpoint.canonical import padded_vocab_size
from mindspeed_lora.config.blend import parse_blend
from mindspeed_lora.config.data import DataConfig
from mindspeed_lora.config.jobs import TrainJob
from mindspeed_lora.config.missing_inputs import without_missing_inputs
from mindspeed_lora.data.indexed_dataset import idx_path
from mindspeed_lora.data.sft_dataset import packed_prefix
from mindspeed_lora.device import compute_dtype, has_accelerator, resident_memory_bytes
from mindspeed_lora.training.description import plan_rows
from mindspeed_lora.training.layer_memory import MemoryQuestion
from mindspeed_lora.training.memory import predict_memory
from mindspeed_lora.training.plan import TrainPlan, plan_training
from mindspeed_lora.training.planned_files import planned_files
from mindspeed_lora.training.raw_data import DATA_FIELDS, raw_paths
from mindspeed_lora.training.reporting import layout_lines

_STAGES_SHOWN = 8


def dry_run(job: TrainJob, environ: Mapping[str, str] = os.environ) -> None:
    """Checks everything and prints, on rank 0, the layout and the predicted memory of each pipeline stage.

    Raises:
        Refused: the job cannot be.
    """
    job, missing = without_missing(job)
    plan = plan_training(job)
    if environ.get("RANK", "0") != "0":
        return
    world_size = job.runtime.resolve_world_size(job.parallel, environ)
    on_cpu = job.runtime.dry_run_device == "cpu" or not (job.runtime.dry_run_device or has_accelerator())
    dtype, notice = compute_dtype(job.training.bf16, job.training.fp16, on_cpu)
    for text in (*missing, *plan.notices, *([notice] if notice else [])):
        print(f"notice: {text}", file=sys.stderr)
    print("\n".join(layout_lines(plan_rows(plan, world_size, dtype, on_cpu), None)))
    question = memory_question(plan, world_size, dtype.itemsize, on_cpu)
    print("\n".join(memory_lines(question)))
    print("\n".join(planned_files(plan, world_size, question)))
    print("dry run: everything checked, nothing written")


def memory_question(
    plan: TrainPlan, world_size: int, itemsize: int, on_cpu: bool | None = None
) -> MemoryQuestion:
    """What the memory of a resolved job depends on; ``on_cpu`` left out: as this machine would compute."""
    job, parallel = plan.job, plan.job.parallel
    longest = plan.seq_length
    if job.data.variable_seq_lengths and not job.data.packing:
        longest = min(longest, plan.rows.train.longest)
    tp = parallel.tensor_model_parallel_size
    return MemoryQuestion(
        shape=plan.shape,
        placement=plan.placement,
        adapter=plan.adapter.spec if plan.adapter is not None else None,
        quantization=plan.quantization,
        training=job.training,
        tp=tp,
        cp=parallel.context_parallel_size,
        dp=parallel.data_parallel_size(world_size),
        ep=parallel.expert_parallel_size,
        etp=parallel.expert_tensor_size,
        sequence_parallel=parallel.sequence_parallel and tp > 1,
        distributed_optimizer=parallel.use_distributed_optimizer,
        seq_length=longest,
        vocab_size=padded_vocab_size(plan.shape, job.model.make_vocab_size_divisible_by or 1, tp),
        itemsize=itemsize,
        on_cpu=not has_accelerator() if on_cpu is None else on_cpu,
    )


def memory_lines(question: MemoryQuestion) -> list[str]:
    """Parameters and predicted memory of a rank of each pipeline stage, by part, in MiB."""
    stages = range(question.placement.pp_size)
    shown = [*stages] if len(stages) <= _STAGES_SHOWN else [0, 1, stages[-2], stages[-1]]
    found = [predict_memory(question, stage) for stage in shown]
    heading = ["memory of a rank, MiB", *(f"stage {stage}" for stage in shown)]
    rows = [heading, ["parameters", *(f"{memory.parameters:,}" for memory in found)]]
    rows.append(["trained", *(f"{memory.trained:,}" for memory in found)])
    if question.quantization is not None:
        rows.append(["quantised", *(f"{memory.quantized.weights:,}" for memory in found)])
        rows.append(["bits of a quantised weight", *(f"{memory.quantized.bits:.2f}" for memory in found)])
    rows += [[part, *(_mib(memory.parts[part]) for memory in found)] for part in found[0].parts]
    process = resident_memory_bytes() if question.on_cpu else 0
    if process:
        rows.append(["process (Python, libraries)", *(_mib(process) for _ in found)])
    rows.append(["total", *(_mib(memory.total + process) for memory in found)])
    if question.training.paged_optimizer:
        place = "a file" if question.on_cpu else "host memory"
        rows.append([f"paged, in {place}", *(_mib(memory.paged) for memory in found)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f" {row[0]:<{widths[0]}} | "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


def without_missing(job: TrainJob) -> tuple[TrainJob, list[str]]:
    """The job without the paths at which nothing is, its data's among them, and a notice for each."""
    job, notices = without_missing_inputs(job)
    data, raw = job.data, raw_paths(job)
    if raw:
        notices.append(f"{', '.join(raw)}: raw rows, which a run would prepare first; full rows are assumed")
        return dataclasses.replace(job, data=_without_paths(data)), notices
    given = {name: words for name in DATA_FIELDS if (words := getattr(data, name)) is not None}
    for name, words in given.items():
        flag = "--" + name.replace("_", "-")
        if not all(_is_prepared(path) for path in parse_blend(words, flag).paths):
            notices.append(f"{flag} {' '.join(words)} is not there: full rows are assumed")
            data = _without_paths(data)
            break
    return dataclasses.replace(job, data=data), notices


def _without_paths(data: DataConfig) -> DataConfig:
    return dataclasses.replace(
        data, data_path=None, train_data_path=None, valid_data_path=None, test_data_path=None
    )


def _is_prepared(prefix: str) -> bool:
    return any(idx_path(path).exists() for path in (prefix, packed_prefix(prefix, "input_ids")))
