"""Everything that is decided before processes join: model, adapter, tokenizer, prompts, and where answers end.

It is the same on every rank, so that what is wrong is refused before any process group exists.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mindspeed_lora.adapters.inject_experts import check_expert_adapters
from mindspeed_lora.checkpoint.loading.model import AdapterPlan
from mindspeed_lora.checkpoint.loading.quantization import QuantPlan, plan_quantization
from mindspeed_lora.checkpoint.loading.random_weights import RandomSource
from mindspeed_lora.checkpoint.peft.plan import plan_adapter
from mindspeed_lora.checkpoint.source import Source, open_source
from mindspeed_lora.config.checks import check_layout, reconcile, shape_from_flags
from mindspeed_lora.config.inference import InferenceConfig
from mindspeed_lora.config.jobs import InferenceJob
from mindspeed_lora.config.moe import experts_from_flags, reconcile_experts
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.config.stages import LayerPlacement
from mindspeed_lora.data.added_tokens import job_tokenizer
from mindspeed_lora.errors import Refused
from mindspeed_lora.inference.generation_config import GenerationDefaults, read_generation_defaults
from mindspeed_lora.inference.generator import Request
from mindspeed_lora.inference.lengths import LengthLimit
from mindspeed_lora.inference.prompts import PromptEncoder, read_prompts
from mindspeed_lora.inference.sampling import TokenChoice
from mindspeed_lora.inference.stopping import StopRule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = "chat"


@dataclass(frozen=True)
class Prompt:
    """One prompt of the job."""

    text: str
    request: Request


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """A job's model and how it is cut, without what needs a tokenizer."""

    job: InferenceJob
    shape: ModelShape
    placement: LayerPlacement
    """The layers of each pipeline stage."""
    source: Source
    adapter: AdapterPlan | None
    quantization: QuantPlan | None
    """The weights that are held quantised; None: none are."""
    notices: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class InferencePlan(ModelPlan):
    """A job, resolved."""

    tokenizer: PreTrainedTokenizerBase
    encoder: PromptEncoder
    chat_encoder: PromptEncoder
    stop: StopRule
    limit: LengthLimit
    defaults: GenerationDefaults
    prompts: tuple[Prompt, ...]
    """What greedy and do_sample answer."""

    def choice(self, task: str) -> TokenChoice:
        """How the tokens of a task are chosen."""
        penalty = self.defaults.repetition_penalty
        if task == "greedy":
            return TokenChoice(do_sample=False, repetition_penalty=penalty)
        inference = self.job.inference
        return TokenChoice(
            do_sample=True,
            temperature=inference.temperature,
            top_k=inference.top_k,
            top_p=inference.top_p,
            repetition_penalty=penalty,
            seed=inference.seed,
        )


def plan_inference(job: InferenceJob) -> InferencePlan:
    """Resolves a job.

    Raises:
        Refused: something contradicts, is missing or cannot be.
    """
    return plan_texts(plan_model(job))


def plan_model(job: InferenceJob) -> ModelPlan:
    """Resolves model, layout and adapter.

    Raises:
        Refused: something contradicts, is missing or cannot be.
    """
    notices: list[str] = []
    source, shape = _model(job, notices)
    job = dataclasses.replace(job, parallel=_without_interleaving(job.parallel, notices))
    placement = check_layout(shape, job.parallel)
    adapter = plan_adapter(job.lora, shape, job.inference.seed)
    if adapter is not None:
        check_expert_adapters(adapter.spec, shape)
        shape = adapter.shape
    quantization = plan_quantization(job.quantization, source, shape, adapter.spec if adapter else None)
    notices += quantization.notices if quantization is not None else ()
    _check_output_file(job.inference)
    if job.parallel.sequence_parallel:
        notices.append("--sequence-parallel has no effect on generation")
    return ModelPlan(
        job=job,
        shape=shape,
        placement=placement,
        source=source,
        adapter=adapter,
        quantization=quantization,
        notices=tuple(notices),
    )


def plan_texts(model: ModelPlan) -> InferencePlan:
    """Adds the tokenizer and what is answered with it.

    Raises:
        Refused: there is no tokenizer, or a prompt is too long or cannot be read.
    """
    job, shape, source, notices = model.job, model.shape, model.source, [*model.notices]
    tokenizer = _tokenizer(job, source, model.adapter)
    encoder = PromptEncoder(tokenizer, job.tokenizer, job.inference.add_eos_token)
    chat_encoder = _chat_encoder(job, encoder, notices)
    limit = LengthLimit.of(job.inference, shape.max_position_embeddings, job.given)
    defaults = read_generation_defaults(source.config_dir)
    if defaults.not_applied:
        notices.append(f"generation_config.json: not applied: {', '.join(defaults.not_applied)}")
    if defaults.repetition_penalty != 1.0:
        notices.append(
            f"generation_config.json: repetition_penalty {defaults.repetition_penalty:g} is applied"
        )
    return InferencePlan(
        job=job,
        shape=shape,
        placement=model.placement,
        source=source,
        adapter=model.adapter,
        quantization=model.quantization,
        tokenizer=tokenizer,
        encoder=encoder,
        chat_encoder=chat_encoder,
        stop=_stop_rule(job, defaults, encoder, chat_encoder),
        limit=limit,
        defaults=defaults,
        prompts=_prompts(job.inference, encoder, limit, shape.vocab_size),
        notices=tuple(notices),
    )


def _without_interleaving(parallel: ParallelConfig, notices: list[str]) -> ParallelConfig:
    """Generation has no micro-batches that could fill the gaps between chunks: each rank holds one."""
    plain = dataclasses.replace(
        parallel, num_layers_per_virtual_pipeline_stage=None, num_virtual_stages_per_pipeline_rank=1
    )
    if plain != parallel:
        notices.append("virtual pipeline stages have no effect on generation")
    return plain


def _model(job: InferenceJob, notices: list[str]) -> tuple[Source, ModelShape]:
    """Where the weights come from; in a dry run without them, the shape that the flags tell."""
    num_noops = len(job.parallel.noop_slots)
    if job.checkpoint.load is None and job.runtime.dry_run:
        shape = experts_from_flags(job.experts, shape_from_flags(job.model, num_noops))
        return RandomSource(shape, job.inference.seed, 0.0), shape
    source = _source(job)
    shape, told = reconcile_experts(job.experts, reconcile(job.model, source.shape, num_noops))
    notices += told
    return source, shape


def _source(job: InferenceJob) -> Source:
    if job.checkpoint.load is None:
        raise Refused(
            "--load is missing: random weights have nothing to say; name a Hugging Face folder or a Megatron "
            "checkpoint"
        )
    return open_source(job.checkpoint.load, checking=not job.checkpoint.no_checking)


def _tokenizer(job: InferenceJob, source: Source, adapter: AdapterPlan | None) -> PreTrainedTokenizerBase:
    """The tokenizer of the flags, else the adapter's where it has words of its own, else the one beside the weights."""
    config = job.tokenizer
    own = adapter.tokenizer_folder if adapter is not None else None
    path = config.tokenizer_name_or_path or config.tokenizer_model or own or source.config_dir
    if path is None:
        raise Refused(
            f"{source.path} holds no tokenizer files; name their folder with --tokenizer-name-or-path"
        )
    return job_tokenizer(config, path).loaded


def _chat_encoder(job: InferenceJob, encoder: PromptEncoder, notices: list[str]) -> PromptEncoder:
    """A conversation without a template says nothing to a model, so chat takes the tokenizer's own."""
    if CHAT not in job.inference.task or not encoder.is_raw:
        return encoder
    if not encoder.tokenizer.chat_template:
        notices.append("chat without a template: give --prompt-type if the model was trained with one")
        return encoder
    notices.append("default taken: chat uses the tokenizer's chat template (--hf-chat-template)")
    config = dataclasses.replace(job.tokenizer, hf_chat_template=True)
    return PromptEncoder(encoder.tokenizer, config, job.inference.add_eos_token)


def _stop_rule(
    job: InferenceJob, defaults: GenerationDefaults, encoder: PromptEncoder, chat_encoder: PromptEncoder
) -> StopRule:
    stops = [(token,) for token in defaults.eos_token_ids] + encoder.stop_sequences()
    if CHAT in job.inference.task:
        stops += chat_encoder.stop_sequences()
    end = encoder.tokenizer.eos_token_id
    if not stops and end is not None:
        stops.append((int(end),))
    return StopRule(tuple(dict.fromkeys(stops)))


def _prompts(
    inference: InferenceConfig, encoder: PromptEncoder, limit: LengthLimit, vocab_size: int
) -> tuple[Prompt, ...]:
    if set(inference.task) == {CHAT}:
        if inference.prompt is not None or inference.prompt_file is not None:
            raise Refused(
                "--task chat reads what you say from standard input; leave out --prompt and --prompt-file"
            )
        return ()
    prompts = []
    for number, text in enumerate(read_prompts(inference), 1):
        tokens = encoder.encode(text)
        if max(tokens) >= vocab_size:
            raise Refused(
                f"the tokenizer {encoder.tokenizer.name_or_path} gives token {max(tokens)}, but the model has "
                f"{vocab_size} words; give the model's own tokenizer"
            )
        room = limit.checked_room(len(tokens), f"prompt {number}")
        prompts.append(Prompt(text, Request(tuple(tokens), room, stream=number - 1)))
    return tuple(prompts)


def _check_output_file(inference: InferenceConfig) -> None:
    """Finds out now, not after hours of generation, that nothing can be written."""
    if inference.output_file is None:
        return
    if set(inference.task) == {CHAT}:
        raise Refused("--output-file is for greedy and do_sample; leave it out with --task chat")
    path = Path(inference.output_file)
    if path.is_dir():
        raise Refused(f"--output-file {path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise Refused(f"--output-file {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise Refused(f"--output-file {path}: no permission to write to {path.parent}; choose another folder")
