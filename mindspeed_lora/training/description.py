"""What a run tells of itself at its start: its layout, model, rows and adapter."""

from __future__ import annotations

import torch

from mindspeed_lora.device import has_accelerator
from mindspeed_lora.training.plan import TrainPlan
from mindspeed_lora.training.reporting import layout_rows


def plan_rows(
    plan: TrainPlan, world_size: int, dtype: torch.dtype, on_cpu: bool | None = None
) -> list[tuple[str, str]]:
    """Names and values of the table for a world of that size and dtype; ``on_cpu`` left out: as this machine."""
    on_cpu = not has_accelerator() if on_cpu is None else on_cpu
    job, device = plan.job, "cpu" if on_cpu else "cuda"
    rows = layout_rows(job.parallel, job.training, world_size, device, str(dtype).removeprefix("torch."))
    rows += [
        ("model", f"{plan.shape.family}, {plan.shape.num_layers} layers, hidden {plan.shape.hidden_size}"),
        ("weights", str(plan.source.path)),
        ("rows", f"{len(plan.rows.train)}, of at most {plan.seq_length} tokens"),
        ("steps", str(plan.num_steps)),
    ]
    if job.parallel.pipeline_model_parallel_size > 1 or plan.placement.noop_slots:
        rows.append(("layers by stage", plan.placement.describe()))
    if plan.quantization is not None:
        rows.append(("quantised", plan.quantization.describe()))
    if plan.adapter is not None:
        rows.append(("adapter", plan.adapter.spec.describe()))
    return rows
