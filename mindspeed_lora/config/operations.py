"""The operations of a conversion on its flags alone: what goes together, and what is missing."""

from __future__ import annotations

import dataclasses

from mindspeed_lora.config.conversion import ConversionConfig
from mindspeed_lora.config.jobs import ConversionJob
from mindspeed_lora.config.resolve_training import LORA_TARGETS
from mindspeed_lora.errors import Refused


def resolve_operations(job: ConversionJob) -> ConversionJob:
    """Refuse operations that contradict each other; fill in what ``--extract-lora`` leaves open."""
    conversion = job.conversion
    _check_adapters(conversion)
    _check_vocabulary(job)
    if not conversion.extract_lora:
        if conversion.extract_base is not None:
            raise Refused(
                f"--extract-base {conversion.extract_base} is given without --extract-lora; add it, or drop it"
            )
        return job
    return _resolve_extraction(job)


def _check_adapters(conversion: ConversionConfig) -> None:
    paths, weights = conversion.lora_load or (), conversion.lora_weights
    if conversion.unmerge and not paths:
        raise Refused("--unmerge is given without --lora-load; name the adapter that was merged")
    if weights is not None and len(weights) != len(paths):
        raise Refused(
            f"--lora-weights gives {len(weights)} numbers for {len(paths)} adapters of --lora-load; give one for each"
        )
    if not (conversion.save_lora_to_hf or conversion.save_model_type == "peft"):
        return
    writes = "--save-lora-to-hf" if conversion.save_lora_to_hf else "--save-model-type peft"
    if len(paths) > 1:
        raise Refused(
            f"{writes} writes one adapter as it is, but --lora-load names {len(paths)}; name one of them, or merge "
            "them into the base with --save-model-type hf or mg"
        )
    for given, flag in ((weights is not None, "--lora-weights"), (conversion.unmerge, "--unmerge")):
        if given:
            raise Refused(f"{flag} changes a model, but {writes} writes an adapter as it is; drop one")


def _check_vocabulary(job: ConversionJob) -> None:
    size, tp_size = job.conversion.pad_vocab_size_to, job.conversion.target_tensor_parallel_size
    if size is None:
        return
    if job.conversion.save_model_type in ("hf", "peft"):
        raise Refused(
            f"--pad-vocab-size-to {size}: --save-model-type {job.conversion.save_model_type} has the model's own "
            "vocabulary; drop the flag"
        )
    multiple = job.model.make_vocab_size_divisible_by * tp_size
    if size % multiple:
        by = f"--target-tensor-parallel-size {tp_size}"
        if job.model.make_vocab_size_divisible_by > 1:
            by += f" × --make-vocab-size-divisible-by {job.model.make_vocab_size_divisible_by}"
        raise Refused(
            f"--pad-vocab-size-to {size} is not divisible by {by}; the next one is {-(-size // multiple) * multiple}"
        )


def _resolve_extraction(job: ConversionJob) -> ConversionJob:
    conversion, lora = job.conversion, job.lora
    if conversion.save_model_type is None:
        conversion = dataclasses.replace(conversion, save_model_type="peft")
    if conversion.save_model_type != "peft" or conversion.save_lora_to_hf:
        raise Refused("--extract-lora writes a PEFT folder into --save-dir; give --save-model-type peft")
    for value, flag in (
        (conversion.lora_load, "--lora-load"),
        (conversion.params_dtype, "--params-dtype"),
        (lora.lora_dropout, "--lora-dropout"),
    ):
        if value is not None:
            raise Refused(f"{flag} has no meaning with --extract-lora, which makes a new adapter; drop it")
    if not job.runtime.print_config and conversion.extract_base is None:
        raise Refused("--extract-lora needs --extract-base, the model that --load-dir was trained from")
    if lora.lora_r is None:
        raise Refused("--extract-lora needs --lora-r, the rank of the adapter")
    filled = dataclasses.replace(
        lora,
        lora_alpha=lora.lora_alpha or 2 * lora.lora_r,
        lora_target_modules=lora.lora_target_modules or LORA_TARGETS,
    )
    return dataclasses.replace(job, conversion=conversion, lora=filled)
