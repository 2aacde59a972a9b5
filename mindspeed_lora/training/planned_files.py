"""What a training would write under ``--save``, told without a file being there (:mod:`.run_folder` draws it)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from mindspeed_lora.adapters.spec import PartSpec
from mindspeed_lora.checkpoint.canonical import canonical_tensors
from mindspeed_lora.config.config_file import CONFIG_FILE
from mindspeed_lora.config.jobs import TrainJob
from mindspeed_lora.training.layer_memory import MemoryQuestion
from mindspeed_lora.training.memory import rank_parameters
from mindspeed_lora.training.plan import TrainPlan

_BYTES = {None: 4, "fp32": 4, "bf16": 2, "fp16": 2}
_STATES = 3
"""Master and both moments, each in float32."""
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def planned_files(plan: TrainPlan, world_size: int, question: MemoryQuestion) -> list[str]:
    """Lines: the files of the run, its checkpoints, and what each of them holds with its size."""
    job, save = plan.job, plan.job.checkpoint.save
    if save is None:
        return ["would write nothing: --save is not given"]
    iterations = saved_iterations(job, plan.start.iteration, plan.num_steps)
    kept = iterations[-(job.checkpoint.save_total_limit or len(iterations)) :]
    named = f"iter_{kept[0]:07d}" + (f" … iter_{kept[-1]:07d}" if len(kept) > 1 else "")
    several = "1 checkpoint" if len(kept) == 1 else f"{len(kept)} checkpoints"
    removed = len(iterations) - len(kept)
    gone = f"; {removed} older ones are removed on the way" if removed else ""
    parts = checkpoint_parts(plan, world_size, question)
    each = sum(parts.values())
    lines = [
        f"would write {save}/",
        f"  {CONFIG_FILE}, metrics.jsonl, loss.png, tensorboard/",
        f"  {named}: {several} of {_size(each)}, {_size(each * len(kept))} in all{gone}",
        *(f"    {name:<28} {_size(size)}" for name, size in parts.items()),
    ]
    if plan.adapter is not None:
        lines.append("  adapter, a link to that of the newest checkpoint")
    if job.checkpoint.save_best:
        lines.append(f"  best/, the checkpoint of the best evaluation loss: {_size(each)}")
    return lines


def saved_iterations(job: TrainJob, first: int, last: int) -> list[int]:
    """Iterations after which a run from ``first`` to ``last`` saves."""
    interval = job.checkpoint.save_interval or last
    return sorted({*range(first - first % interval + interval, last + 1, interval), last})


def checkpoint_parts(plan: TrainPlan, world_size: int, question: MemoryQuestion) -> Mapping[str, int]:
    """Bytes of one checkpoint by part; the tokenizer's files and headers are left out."""
    job, parallel = plan.job, plan.job.parallel
    model = sum(math.prod(size) for size in canonical_tensors(plan.shape).values())
    parts: dict[str, int] = {}
    trained = model
    if plan.adapter is not None:
        spec = plan.adapter.spec
        besides = sum(math.prod(tensor.size) for tensor in spec.trained)
        besides += sum(len(rows.tokens) * rows.width for rows in spec.token_rows)
        trained = besides + sum(math.prod(size) for size in spec.tensors.values())
        written = besides + sum(map(_written, spec.parts))
        parts["adapter/"] = written * _BYTES[job.lora.lora_save_dtype]
    if plan.adapter is None or job.lora.lora_save_base:
        experts = parallel.expert_parallel_size if plan.shape.moe is not None else 1
        files = parallel.model_parallel_size * experts
        itemsize = 4 if job.training.params_dtype == "float32" else 2
        parts[f"mp_rank_*/ ({files} files)" if files > 1 else "mp_rank_00/"] = model * itemsize
    if not job.checkpoint.no_save_optim:
        if plan.shape.moe is None:
            # Each TP rank writes its own copy of what is not cut.
            stages = range(parallel.pipeline_model_parallel_size)
            trained = question.tp * sum(rank_parameters(question, stage).trained for stage in stages)
        parts["optimizer/"] = trained * _STATES * 4
    if not job.checkpoint.no_save_rng:
        parts[f"random/ ({world_size} files)" if world_size > 1 else "random/"] = 5000 * world_size
    return parts


def _written(part: PartSpec) -> int:
    """Numbers in the adapter's file: every Hugging Face matrix has an A of its own there, every expert a B."""
    experts = {match[1] for name in part.hf_modules if (match := _EXPERT.search(name))}
    return part.rank * (len(part.hf_modules) * part.in_features + max(len(experts), 1) * part.out_features)


def _size(count: int) -> str:
    for unit, bytes_of_unit in (("GB", 10**9), ("MB", 10**6)):
        if count >= bytes_of_unit:
            return f"{count / bytes_of_unit:.1f} {unit}"
    return f"{count / 1000:.0f} kB"
