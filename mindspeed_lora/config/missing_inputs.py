"""What a dry run does without: models, adapters and tokenizers at whose paths nothing is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TypeVar

from mindspeed_lora.config.jobs import EvaluationJob, InferenceJob, TrainJob
from mindspeed_lora.config.resolve_training import DEFAULT_LORA_R, LORA_TARGETS
from mindspeed_lora.config.shape_flags import missing_shape_flags
from mindspeed_lora.errors import Refused

ASSUMED_VOCABULARY = 32_000
"""Words of a model of which no flag tells how many it has; published scripts take them from the checkpoint."""

AnyJob = TypeVar("AnyJob", TrainJob, InferenceJob, EvaluationJob)


def without_missing_inputs(job: AnyJob) -> tuple[AnyJob, list[str]]:
    """The job without the paths at which nothing is, and a notice for each.

    Raises:
        Refused: one is the model, and the flags do not tell its shape.
    """
    notices: list[str] = []
    checkpoint, lora, tokenizer, model = job.checkpoint, job.lora, job.tokenizer, job.model
    if checkpoint.load is not None and not Path(checkpoint.load).exists():
        missing = missing_shape_flags(model, ASSUMED_VOCABULARY)
        if missing:
            raise Refused(
                f"--load {checkpoint.load} is not there, and a dry run without it needs the shape: "
                f"{', '.join(missing)} missing"
            )
        notices.append(f"--load {checkpoint.load} is not there: the model's shape is taken from the flags")
        checkpoint = dataclasses.replace(checkpoint, load=None)
        if model.num_layers is not None and model.vocab_size is None and model.padded_vocab_size is None:
            notices.append(f"no flag tells the vocabulary: --vocab-size {ASSUMED_VOCABULARY} is assumed")
            model = dataclasses.replace(model, vocab_size=ASSUMED_VOCABULARY)
    rank, assumed = lora.lora_r or DEFAULT_LORA_R, False
    if lora.lora_load is not None and not Path(lora.lora_load).exists():
        notices.append(f"--lora-load {lora.lora_load} is not there: an adapter of rank {rank} is assumed")
        assumed = True
    elif (
        lora.enabled and lora.lora_load is None and checkpoint.load is None and not isinstance(job, TrainJob)
    ):
        notices.append(
            f"LoRA flags without --lora-load: an adapter of rank {rank} beside the weights is assumed"
        )
        assumed = True
    if assumed:
        alpha = 2 * rank if lora.lora_alpha is None else lora.lora_alpha
        targets = lora.lora_target_modules or LORA_TARGETS
        lora = dataclasses.replace(
            lora, lora_load=None, lora_r=rank, lora_alpha=alpha, lora_target_modules=targets
        )
    named = tokenizer.tokenizer_name_or_path or tokenizer.tokenizer_model
    if named is not None and not Path(named).exists():
        notices.append(f"the tokenizer {named} is not there")
        tokenizer = dataclasses.replace(tokenizer, tokenizer_name_or_path=None, tokenizer_model=None)
    job = dataclasses.replace(job, checkpoint=checkpoint, lora=lora, tokenizer=tokenizer, model=model)
    return job, notices
