"""The live parts of a job on one rank: the model with its adapter, and the generator that drives it."""

from __future__ import annotations

import dataclasses

from mindspeed_lora.adapters.schedules import Family, SchedulePlan
from mindspeed_lora.adapters.schedules.choice import Scheduler
from mindspeed_lora.checkpoint.loading.checking import check_share
from mindspeed_lora.checkpoint.loading.model import build_model
from mindspeed_lora.device import compute_dtype
from mindspeed_lora.inference.generator import Answer, Generator
from mindspeed_lora.inference.plan import InferencePlan
from mindspeed_lora.models.transformer_config import transformer_config
from mindspeed_lora.parallel.collectives import together
from mindspeed_lora.parallel.groups import ParallelGroups


class InferenceSession:
    """Built from a plan on every rank."""

    def __init__(self, plan: InferencePlan, groups: ParallelGroups) -> None:
        job = plan.job
        self.plan = plan
        self.groups = groups
        dtype, notice = compute_dtype(job.inference.bf16, job.inference.fp16)
        self.notices = [notice] if notice else []
        # One new token a step cannot be cut along the sequence.
        parallel = dataclasses.replace(job.parallel, sequence_parallel=False)
        config = transformer_config(plan.shape, parallel, groups, dtype)
        divisible_by = job.model.make_vocab_size_divisible_by or 1
        together(groups, lambda: check_share(plan.source, groups))
        model, _ = together(
            groups,
            lambda: build_model(
                plan.shape,
                config,
                groups,
                plan.source,
                plan.adapter,
                divisible_by,
                plan.placement.chunk(groups.pp_rank),
                Scheduler(fixed=SchedulePlan(Family.ONE_COLLECTIVE)),
                quantization=plan.quantization,
            ),
        )
        self.generator = Generator(model, groups, plan.stop)

    def text(self, answer: Answer) -> str:
        """An answer without its stop and without special tokens."""
        return str(self.plan.tokenizer.decode(answer.text_tokens, skip_special_tokens=True))
