"""The rules that span several flags of a command: what is filled in, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from mindspeed_lora.config.flags import Section, options
from mindspeed_lora.config.inference import ALL_TASKS, TASKS, USED_BY, ComputeFlags
from mindspeed_lora.config.jobs import (
    ConversionJob,
    EvaluationJob,
    InferenceJob,
    InspectJob,
    Job,
    PreprocessJob,
    VerifyJob,
)
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.config.parallel import StagesConfig
from mindspeed_lora.config.resolve_quantization import check_conversion_quantization, check_quantization
from mindspeed_lora.config.tokenizer import TokenizerConfig
from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.errors import Refused

DEFAULT_PROMPT = "how are you?"

AnyModelJob = TypeVar("AnyModelJob", InferenceJob, EvaluationJob)


def resolve_inference(job: InferenceJob, environ: Mapping[str, str]) -> InferenceJob:
    """Check an inference job; several replicas of the model are fine, they all generate the same."""
    inference = job.inference
    notices = list(job.notices)
    if inference.prompt is not None and inference.prompt_file is not None:
        raise Refused("--prompt and --prompt-file are both given; give one of them")
    tasks = tuple(TASKS[name] for name in inference.task)
    if "task" not in job.given:
        tasks = _default_tasks(job)
        left_out = "" if "chat" in tasks or len(tasks) == 1 else " (chat needs a terminal)"
        notices.append(f"default taken: --task {' '.join(tasks)}{left_out}")
    if inference.prompt is None and inference.prompt_file is None and set(tasks) != {"chat"}:
        inference = dataclasses.replace(inference, prompt=(DEFAULT_PROMPT,))
        notices.append(f"default taken: --prompt {DEFAULT_PROMPT!r}")
    if inference.num_return_sequences > inference.num_beams:
        raise Refused(
            f"--num-return-sequences {inference.num_return_sequences} is more than --num-beams "
            f"{inference.num_beams}; raise --num-beams"
        )
    idle = [
        f"--{name.replace('_', '-')}"
        for users, names in USED_BY
        if not users & set(tasks)
        for name in names
        if name in job.given
    ]
    if idle:
        notices.append(f"no effect on {' '.join(tasks)}: {', '.join(idle)}")
    inference = dataclasses.replace(inference, task=tasks)
    return resolve_model_job(dataclasses.replace(job, inference=inference, notices=tuple(notices)), environ)


def _default_tasks(job: InferenceJob) -> tuple[str, ...]:
    """All five, as a script without ``--task`` means it; one where prompts or a file of answers are named."""
    inference = job.inference
    if inference.prompt is not None or inference.prompt_file is not None or inference.output_file is not None:
        return ("greedy",)
    on_terminal = sys.stdin is not None and sys.stdin.isatty()
    return ALL_TASKS if on_terminal else tuple(task for task in ALL_TASKS if task != "chat")


def resolve_model_job(job: AnyModelJob, environ: Mapping[str, str]) -> AnyModelJob:
    """Check what all jobs have that run a model without training it."""
    check_precision(job.compute)
    check_template(job.tokenizer)
    check_quantization(job.quantization)
    notices = list(job.notices)
    if job.lora.lora_fusion:
        notices.append(
            "--lora-fusion has no effect on generation: it hides what a backward pass and long rows send"
        )
    if job.parallel.context_parallel_size > 1:
        job = dataclasses.replace(job, parallel=dataclasses.replace(job.parallel, context_parallel_size=1))
        notices.append("--context-parallel-size has no effect on generation: its ranks answer other prompts")
    if not job.runtime.print_config:
        job.parallel.data_parallel_size(job.runtime.resolve_world_size(job.parallel, environ))
        if job.checkpoint.load is None and job.checkpoint.exit_on_missing_checkpoint:
            raise Refused("--exit-on-missing-checkpoint is given without --load; name the model")
        if not job.runtime.dry_run:
            refuse_placeholders(job)
    return dataclasses.replace(job, notices=tuple(notices))


def resolve_conversion(job: ConversionJob) -> ConversionJob:
    """Check a conversion job; without ``--save-model-type``, ``--save-lora-to-hf`` and ``--saver`` tell it."""
    conversion = job.conversion
    if conversion.save_model_type is None and (conversion.save_lora_to_hf or conversion.saver is not None):
        writes_hf = conversion.save_lora_to_hf or re.search("hf|huggingface", conversion.saver or "")
        stands_for = "hf" if writes_hf else "mg"
        conversion = dataclasses.replace(conversion, save_model_type=stands_for)
    if conversion.save_model_type == "mg" and conversion.ckpt_format == "torch_dist":
        conversion = dataclasses.replace(conversion, save_model_type="torch_dist")
    if conversion.save_model_type == "torch_dist" and conversion.ckpt_format == "torch":
        raise Refused("--save-model-type torch_dist contradicts --ckpt-format torch; drop one")
    if conversion.save_lora_to_hf and conversion.save_model_type in ("mg", "torch_dist"):
        raise Refused(
            "--save-lora-to-hf writes a Hugging Face adapter, but --save-model-type is "
            f"{conversion.save_model_type}; drop one"
        )
    for name, size in (
        ("--target-tensor-parallel-size", conversion.target_tensor_parallel_size),
        ("--target-pipeline-parallel-size", conversion.target_pipeline_parallel_size),
        ("--target-expert-parallel-size", conversion.target_expert_parallel_size),
    ):
        if size > 1 and conversion.save_model_type in ("hf", "peft"):
            raise Refused(
                f"{name} {size}: --save-model-type {conversion.save_model_type} is not cut over ranks; use 1"
            )
    check_conversion_quantization(
        job.quantization, conversion.save_model_type, conversion.lora_load is not None
    )
    if conversion.moe_tp_extend_ep and conversion.expert_tensor_parallel_size not in (None, 1):
        raise Refused(
            "--moe-tp-extend-ep leaves each expert whole, but --expert-tensor-parallel-size is "
            f"{conversion.expert_tensor_parallel_size}; drop one"
        )
    stages = [o.name for o in options(StagesConfig) if getattr(job.stages, o.dest) != o.default]
    notices = job.notices
    if stages and conversion.save_model_type in ("hf", "peft"):
        notices += (
            f"no effect on --save-model-type {conversion.save_model_type}, and the stages of the source are found from "
            f"its files: {', '.join(stages)}",
        )
    if not job.runtime.print_config:
        require(conversion, "load_dir", "save_dir", "save_model_type")
        _check_target(conversion.load_dir or "", conversion.save_dir or "", conversion.save_model_type)
        if not job.runtime.dry_run:
            refuse_placeholders(job)
    return dataclasses.replace(job, conversion=conversion, notices=notices)


def _check_target(load_dir: str, save_dir: str, save_model_type: str | None) -> None:
    """A Hugging Face target is a new folder inside ``save_dir``; the others are ``save_dir`` itself."""
    if save_model_type != "hf" and os.path.realpath(load_dir) == os.path.realpath(save_dir):
        raise Refused(f"--save-dir {save_dir} is the --load-dir; name another folder")


def resolve_inspection(job: InspectJob) -> InspectJob:
    """Check an inspection job."""
    if not job.runtime.print_config:
        require(job.inspect, "dir")
        refuse_placeholders(job)
    return job


def resolve_verification(job: VerifyJob) -> VerifyJob:
    """Check a verification job."""
    verify = job.verify
    if verify.second is None and verify.tolerance is not None:
        raise Refused("--tolerance is given with one checkpoint only; name the one to compare it with")
    if not job.runtime.print_config:
        require(verify, "first")
        refuse_placeholders(job)
    return job


def resolve_preprocess(job: PreprocessJob) -> PreprocessJob:
    """Check a preprocessing job."""
    check_template(job.tokenizer)
    config = job.preprocess
    if (config.pack or config.neat_pack) and config.seq_length is None:
        name = "--neat-pack" if config.neat_pack else "--pack"
        raise Refused(f"{name} is given without --seq-length; give the length of the packed rows")
    if not job.runtime.print_config:
        if config.hf_datasets_params is None and not config.datasets:
            require(config, "input")
        if config.show is None or job.runtime.dry_run:
            require(config, "output_prefix")
        if config.merge_group_keys:
            return job
        if job.tokenizer.tokenizer_model is None:
            require(job.tokenizer, "tokenizer_name_or_path")
        if not job.runtime.dry_run:
            refuse_placeholders(job)
    return job


def check_precision(config: TrainingConfig | ComputeFlags) -> None:
    """At most one of the two half precisions."""
    if config.bf16 and config.fp16:
        raise Refused("--bf16 and --fp16 are both given; give one of them, or none for fp32")


def check_template(tokenizer: TokenizerConfig) -> None:
    """At most one source of the prompt template."""
    if tokenizer.prompt_type is not None and tokenizer.hf_chat_template:
        raise Refused(
            f"--prompt-type {tokenizer.prompt_type} and --hf-chat-template are both given; give one of them"
        )


def require(section: Any, *fields: str) -> None:
    """Refuse a section in which one of the fields was left out."""
    for option in options(type(section)):
        if option.dest in fields and getattr(section, option.dest) is None:
            raise Refused(f"{option.label} is missing: {option.flag.help}")


def refuse_placeholders(job: Job) -> None:
    """Refuse the words that published scripts have in place of a path (``your data path``)."""
    for name, value in _texts(job):
        if re.fullmatch(r"your .*path", value.strip(), flags=re.IGNORECASE):
            raise Refused(f"{name} is still the placeholder {value!r}; put a path of yours there")


def _texts(job: Job) -> Iterable[tuple[str, str]]:
    for field in dataclasses.fields(job):
        section = getattr(job, field.name)
        if isinstance(section, Section):
            for option in options(type(section)):
                value = getattr(section, option.dest)
                if isinstance(value, str):
                    yield option.name, value
                elif isinstance(value, tuple):
                    yield option.name, " ".join(map(str, value))


def given_lora(job: Job) -> bool:
    """Whether the user gave any LoRA flag, even one that repeats its default."""
    return any(option.dest in job.given for option in options(LoraConfig))
