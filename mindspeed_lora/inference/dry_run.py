"""``--dry-run``: the job is resolved as for generation, without weights and without peers, and told.

What a flag names and cannot be found is taken from the other flags, and told. Nothing is written.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from mindspeed_lora.config.inference import BEAM_SEARCH
from mindspeed_lora.config.jobs import InferenceJob
from mindspeed_lora.config.missing_inputs import without_missing_inputs
from mindspeed_lora.device import compute_dtype, has_accelerator, resident_memory_bytes
from mindspeed_lora.inference.lengths import LengthLimit
from mindspeed_lora.inference.memory import Work, memory_rows, predict_inference_memory
from mindspeed_lora.inference.model_plan import ModelPlan, plan_model
from mindspeed_lora.inference.plan import CHAT, InferencePlan, check_output_file, plan_texts
from mindspeed_lora.training.reporting import layout_lines


def dry_run(job: InferenceJob, environ: Mapping[str, str] = os.environ) -> None:
    """Checks everything and prints, on rank 0, the layout, the model and what would be answered.

    Raises:
        Refused: the job cannot be.
    """
    job, missing = without_missing_inputs(job)
    prompt_file = job.inference.prompt_file
    if prompt_file is not None and not Path(prompt_file).exists():
        missing.append(f"--prompt-file {prompt_file} is not there: no prompt is checked")
        job = dataclasses.replace(job, inference=dataclasses.replace(job.inference, prompt_file=None))
    plan = plan_model(job)
    check_output_file(job.inference)
    named = job.tokenizer.tokenizer_name_or_path or job.tokenizer.tokenizer_model
    if named is not None or plan.source.config_dir is not None or not missing:
        plan = plan_texts(job, plan)
    else:
        missing.append("there is no tokenizer: prompts and their lengths are not checked")
    if environ.get("RANK", "0") != "0":
        return
    dtype, notice = compute_dtype(job.inference.bf16, job.inference.fp16)
    for text in (*missing, *plan.notices, *([notice] if notice else [])):
        print(f"notice: {text}", file=sys.stderr)
    world_size = job.runtime.resolve_world_size(job.parallel, environ)
    rows = [*model_rows(plan, world_size, dtype), *_rows(job, plan)]
    rows += predicted_rows(plan, _work(job, plan), world_size, dtype)
    print("\n".join(layout_lines(rows, None)))
    print("dry run: everything checked, nothing written")


def model_rows(plan: ModelPlan, world_size: int, dtype: torch.dtype) -> list[tuple[str, str]]:
    """Names and values of the table, as far as they tell of the model and its layout."""
    job, parallel, shape = plan.job, plan.job.parallel, plan.shape
    rows = [
        ("world size", f"{world_size} ({'cuda' if has_accelerator() else 'cpu'})"),
        ("tensor parallel", str(parallel.tensor_model_parallel_size)),
        ("pipeline parallel", str(parallel.pipeline_model_parallel_size)),
        ("replicas", str(parallel.data_parallel_size(world_size))),
    ]
    if shape.moe is not None:
        experts = f"{parallel.expert_parallel_size}, each over {parallel.expert_tensor_size}"
        rows.append(("expert parallel", experts))
    rows += [
        ("dtype", str(dtype).removeprefix("torch.")),
        ("model", f"{shape.family}, {shape.num_layers} layers, hidden {shape.hidden_size}"),
        ("weights", str(plan.source.path) if job.checkpoint.load is not None else "not there"),
        ("layers by stage", plan.placement.describe()),
    ]
    if plan.adapter is not None:
        rows.append(("adapter", plan.adapter.spec.describe()))
    return rows


def predicted_rows(plan: ModelPlan, work: Work, world_size: int, dtype: torch.dtype) -> list[tuple[str, str]]:
    """Names and values of the table that tell the memory of a rank."""
    on_cpu = not has_accelerator()
    found = predict_inference_memory(plan, work, world_size, dtype.itemsize, on_cpu)
    return memory_rows(found, resident_memory_bytes() if on_cpu else 0)


def _work(job: InferenceJob, plan: ModelPlan) -> Work:
    """The prompts of the job, and one as long as can be for a chat or where prompts are not known."""
    inference, works = job.inference, []
    if isinstance(plan, InferencePlan) and plan.prompts:
        requests = [prompt.request for prompt in plan.prompts]
        if set(inference.task) & set(BEAM_SEARCH):
            works.append(Work.of_beams(requests, inference.micro_batch_size, inference.num_beams))
        if set(inference.task) - {*BEAM_SEARCH, CHAT}:
            works.append(Work.of_prompts(requests, inference.micro_batch_size))
    if not works or CHAT in inference.task:
        limit = LengthLimit.of(inference, plan.shape.max_position_embeddings, job.given)
        works.append(Work(1, limit.longest, max(1, limit.longest - limit.max_new_tokens), 1))
    return Work.most(works)


def _rows(job: InferenceJob, plan: ModelPlan) -> list[tuple[str, str]]:
    """Names and values of the table that tell what is generated."""
    rows = [("task", " ".join(job.inference.task))]
    if isinstance(plan, InferencePlan) and plan.prompts:
        longest = max(len(prompt.request.tokens) for prompt in plan.prompts)
        rows.append(("prompts", f"{len(plan.prompts)}, of at most {longest} tokens"))
        room = max(prompt.request.max_new_tokens for prompt in plan.prompts)
        rows.append(("answers", f"of at most {room} tokens"))
    if job.inference.output_file is not None:
        rows.append(("output file", job.inference.output_file))
    return rows
