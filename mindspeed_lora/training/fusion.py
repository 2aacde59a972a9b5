"""``--lora-fusion`` of a job: what its flags ask for, and the speeds that the rest is chosen by."""

from __future__ import annotations

import torch

from mindspeed_lora.adapters.schedules import Family
from mindspeed_lora.adapters.schedules.choice import FusionRequest, Scheduler, measure
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.device import current_device
from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.training.experts import exchange_share
from mindspeed_lora.training.plan import TrainPlan
from mindspeed_lora.training.reporting.model_flops import ModelFlops

WORTH_INTERLEAVING = 1.0
"""Link by products, from where on halves by turns gain (``benchmarks/cclora.py``: a loss at 0.5, a gain at 1)."""
WORTH_HALVING_TOKENS = 0.4
"""Exchanges by products, from where on halves of one row's tokens gain (``benchmarks/moe_overlap.py``: a loss at 0.25,
a gain at 0.5). Halves of the rows never lost."""


def fusion_scheduler(plan: TrainPlan, groups: ParallelGroups, dtype: torch.dtype) -> Scheduler:
    """What gives each linear its schedule; all ranks call it, since it measures their link."""
    lora, parallel = plan.job.lora, plan.job.parallel
    if plan.adapter is None or not lora.lora_fusion:
        return Scheduler()
    # Each context-parallel rank has its share of every row.
    tokens = plan.seq_length * plan.job.training.micro_batch_size // parallel.context_parallel_size
    tokens = max(1, tokens // 2) if lora.lora_fusion_interleave else tokens
    return Scheduler(
        fusion_request(lora, may_merge=_why_not_merged(plan) is None),
        tokens=tokens,
        tp=groups.tp_size,
        sequence_parallel=parallel.sequence_parallel,
        speeds=measure(tokens, plan.shape.hidden_size, dtype, current_device(), groups),
    )


def fusion_request(lora: LoraConfig, may_merge: bool) -> FusionRequest:
    """What the flags fix of every linear's schedule."""
    words = lora.lora_fusion_plan or ()
    family = next((family for family in Family if family.value in words), None)
    if lora.lora_fusion_chunks is not None or lora.lora_fusion_interleave:
        family = Family.ONE_COLLECTIVE
    merge = True if "merge" in words else False if "split" in words else None
    merge = merge if may_merge else False
    return FusionRequest(family, merge, lora.lora_fusion_chunks)


def fusion_notices(plan: TrainPlan) -> list[str]:
    """What was asked for and cannot be."""
    words = plan.job.lora.lora_fusion_plan or ()
    why = _why_not_merged(plan)
    return [f"--lora-fusion-plan merge: nothing is merged, since {why}"] if "merge" in words and why else []


def _why_not_merged(plan: TrainPlan) -> str | None:
    """Why no product can go through ``W + BA``; None where it can."""
    if plan.quantization is not None:
        return "W is quantised, and W + BA would not be"
    if plan.adapter is not None and plan.adapter.spec.dropout > 0.0:
        return "dropout stands between the input and A"
    return None


def interleaving(
    plan: TrainPlan, scheduler: Scheduler, groups: ParallelGroups, dtype: torch.dtype
) -> str | None:
    """What of a micro-batch the layers take in two halves by turns: where asked for, or where the link is slow.

    Halves make smaller products, which costs some percent; a slow link, which chunks alone cannot hide, gives more.
    All ranks call it.
    """
    halves = "rows" if plan.job.training.micro_batch_size > 1 else "tokens"
    if _interleaves_linears(plan, scheduler):
        return halves
    if plan.shape.moe is None or not plan.job.routing.overlaps or groups.experts.group is None:
        return None
    if halves == "rows":
        return halves
    tokens = plan.seq_length // plan.job.parallel.context_parallel_size
    adapter = None if plan.adapter is None else plan.adapter.spec
    share = exchange_share(plan.shape, tokens, ModelFlops.of(plan.shape, adapter).per_token, groups, dtype)
    if share >= WORTH_HALVING_TOKENS:
        return halves
    scheduler.lines.append(
        "--moe-alltoall-overlap-comm: micro-batches of one row are not halved, since their exchanges are predicted "
        f"to take {share:.2g} times as long as the products; --micro-batch-size 2 overlaps at any speed"
    )
    return None


def _interleaves_linears(plan: TrainPlan, scheduler: Scheduler) -> bool:
    job, request = plan.job, scheduler.request
    if request is None:
        return False
    if not job.lora.lora_fusion_interleave:
        is_free = request.family in (None, Family.ONE_COLLECTIVE) and request.chunks is None
        if not is_free or scheduler.link_share < WORTH_INTERLEAVING:
            return False
        scheduler.lines.append(
            "--lora-fusion: halves of a micro-batch go through each layer by turns, since the link takes "
            f"{scheduler.link_share:.2g} times as long as the products"
        )
    return True
