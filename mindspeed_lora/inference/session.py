"""The live parts of a job on one rank: the model with its adapter, and what drives it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mindspeed_lora.adapters.schedules import Family, SchedulePlan
from mindspeed_lora.adapters.schedules.choice import Scheduler
from mindspeed_lora.checkpoint.loading.checking import check_share
from mindspeed_lora.checkpoint.loading.model import build_model
from mindspeed_lora.config.inference import BEAM_SEARCH
from mindspeed_lora.device import compute_dtype
from mindspeed_lora.inference.beam_search import BeamSearch
from mindspeed_lora.inference.generator import Answer, Generator, Request
from mindspeed_lora.inference.model_plan import ModelPlan
from mindspeed_lora.inference.plan import InferencePlan
from mindspeed_lora.models.gpt import GPTModel
from mindspeed_lora.models.transformer_config import transformer_config
from mindspeed_lora.parallel.collectives import together
from mindspeed_lora.parallel.groups import ParallelGroups


def load_model(plan: ModelPlan, groups: ParallelGroups) -> tuple[GPTModel, list[str]]:
    """This rank's part of the model with its adapter, and notices for the user. Called by all ranks."""
    job = plan.job
    dtype, notice = compute_dtype(job.compute.bf16, job.compute.fp16)
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
    return model, [notice] if notice else []


READING = "reading the weights"
"""Phase in which a session is built."""


class InferenceSession:
    """Built from a plan on every rank."""

    def __init__(self, plan: InferencePlan, groups: ParallelGroups) -> None:
        self.plan = plan
        self.groups = groups
        self.model, self.notices = load_model(plan, groups)
        self.generator = Generator(self.model, groups, plan.stop)
        self.beam_search = BeamSearch(self.model, groups, plan.stop)

    def answer(self, task: str, requests: Sequence[Request]) -> list[list[Answer]]:
        """To each request the answers that are told, best first; called by all ranks of the replica."""
        choice = self.plan.choice(task)
        if task in BEAM_SEARCH:
            return self.beam_search.answer(requests, choice, self.plan.beams)
        return [[answer] for answer in self.generator.generate(requests, choice)]

    def text(self, answer: Answer) -> str:
        """An answer without its stop and without special tokens."""
        text = str(self.plan.tokenizer.decode(answer.text_tokens, skip_special_tokens=True))
        return self.plan.stop.cut(text)
