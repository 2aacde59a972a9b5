"""Everything that is decided before processes join, beside the model: tokenizer, prompts, and where answers end.

It is the same on every rank, so that what is wrong is refused before any process group exists.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mindspeed_lora.config.inference import InferenceConfig
from mindspeed_lora.config.jobs import InferenceJob
from mindspeed_lora.errors import Refused
from mindspeed_lora.inference.beam_search import BeamSettings
from mindspeed_lora.inference.generation_config import GenerationDefaults, read_generation_defaults
from mindspeed_lora.inference.generator import Request
from mindspeed_lora.inference.lengths import LengthLimit
from mindspeed_lora.inference.model_plan import ModelPlan, plan_model, plan_tokenizer
from mindspeed_lora.inference.prompts import PromptEncoder, check_tokens, end_sequences, read_prompts
from mindspeed_lora.inference.sampling import TokenChoice
from mindspeed_lora.inference.stopping import StopRule, StopWords

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = "chat"


@dataclass(frozen=True)
class Prompt:
    """One prompt of the job."""

    text: str
    request: Request


@dataclass(frozen=True, kw_only=True)
class InferencePlan(ModelPlan):
    """A job, resolved."""

    job: InferenceJob
    tokenizer: PreTrainedTokenizerBase
    encoder: PromptEncoder
    chat_encoder: PromptEncoder
    stop: StopRule
    limit: LengthLimit
    defaults: GenerationDefaults
    prompts: tuple[Prompt, ...]
    """What every task but chat answers."""

    @property
    def beams(self) -> BeamSettings:
        """How beam search goes."""
        inference = self.job.inference
        return BeamSettings(
            num_beams=inference.num_beams,
            length_penalty=inference.length_penalty,
            early_stopping=inference.early_stopping,
            num_return_sequences=inference.num_return_sequences,
        )

    def choice(self, task: str) -> TokenChoice:
        """How the tokens of a task are chosen."""
        penalty = self.defaults.repetition_penalty
        if task in ("greedy", "beam_search"):
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
    return plan_texts(job, plan_model(job))


def plan_texts(job: InferenceJob, model: ModelPlan) -> InferencePlan:
    """Adds the tokenizer and what is answered with it.

    Raises:
        Refused: there is no tokenizer, or a prompt is too long or cannot be read.
    """
    shape, source, notices = model.shape, model.source, [*model.notices]
    check_output_file(job.inference)
    tokenizer = plan_tokenizer(model)
    encoder = PromptEncoder(tokenizer, job.tokenizer, job.inference.add_eos_token == ())
    if set(job.inference.task) != {CHAT}:
        notices += encoder.notices()
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
        job=dataclasses.replace(job, parallel=model.job.parallel, lora=model.job.lora),
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


def _chat_encoder(job: InferenceJob, encoder: PromptEncoder, notices: list[str]) -> PromptEncoder:
    """A conversation without a template says nothing to a model, so chat takes the tokenizer's own."""
    if CHAT not in job.inference.task or not encoder.is_raw:
        return encoder
    if not encoder.tokenizer.chat_template:
        notices.append("chat without a template: give --prompt-type if the model was trained with one")
        return encoder
    notices.append("default taken: chat uses the tokenizer's chat template (--hf-chat-template)")
    config = dataclasses.replace(job.tokenizer, hf_chat_template=True)
    return PromptEncoder(encoder.tokenizer, config, job.inference.add_eos_token == ())


def _stop_rule(
    job: InferenceJob, defaults: GenerationDefaults, encoder: PromptEncoder, chat_encoder: PromptEncoder
) -> StopRule:
    encoders = (encoder, chat_encoder) if CHAT in job.inference.task else (encoder,)
    words = StopWords.of(encoder.tokenizer, job.inference.stop_words or ())
    added = ((encoder.end_token(text),) for text in job.inference.add_eos_token or ())
    return StopRule((*end_sequences(defaults.eos_token_ids, *encoders), *added), words)


def _prompts(
    inference: InferenceConfig, encoder: PromptEncoder, limit: LengthLimit, vocab_size: int
) -> tuple[Prompt, ...]:
    if set(inference.task) == {CHAT}:
        if inference.prompt is not None or inference.prompt_file is not None:
            raise Refused(
                "--task chat reads what you say from standard input; leave out --prompt and --prompt-file"
            )
        return ()
    return plan_prompts(read_prompts(inference), encoder, limit, vocab_size)


def plan_prompts(
    texts: Sequence[str], encoder: PromptEncoder, limit: LengthLimit, vocab_size: int
) -> tuple[Prompt, ...]:
    """The texts as requests to the generator.

    Raises:
        Refused: one is too long, or has a token that the model does not know.
    """
    prompts = []
    for number, text in enumerate(texts, 1):
        tokens = encoder.encode(text)
        check_tokens(tokens, encoder.tokenizer, vocab_size)
        room = limit.checked_room(len(tokens), f"prompt {number}")
        prompts.append(Prompt(text, Request(tuple(tokens), room, stream=number - 1)))
    return tuple(prompts)


def check_output_file(inference: InferenceConfig) -> None:
    """Finds out now, not after hours of generation, that nothing can be written.

    Raises:
        Refused: with the reason.
    """
    if inference.output_file is None:
        return
    if set(inference.task) == {CHAT}:
        raise Refused("--output-file holds answers to prompts; leave it out with --task chat")
    path = Path(inference.output_file)
    if path.is_dir():
        raise Refused(f"--output-file {path}: is a folder; name a file")
    if path.exists() and (not path.is_file() or path.absolute().is_relative_to("/dev")):
        raise Refused(
            f"--output-file {path}: is a device or a pipe, which a file cannot replace; name a file"
        )
    if inference.prompt_file is not None and path.resolve() == Path(inference.prompt_file).resolve():
        raise Refused(f"--output-file {path}: holds the prompts (--prompt-file); name another file")
    if not path.parent.is_dir():
        raise Refused(f"--output-file {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise Refused(f"--output-file {path}: no permission to write to {path.parent}; choose another folder")
