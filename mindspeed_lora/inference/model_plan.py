"""The model of a job that runs one without training it: weights, layout, adapter, quantisation.

It is the same on every rank, so that what is wrong is refused before any process group exists.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mindspeed_lora.adapters.inject_experts import check_expert_adapters
from mindspeed_lora.checkpoint.formats.mcore import McoreSource
from mindspeed_lora.checkpoint.loading.model import AdapterPlan
from mindspeed_lora.checkpoint.loading.quantization import QuantPlan, plan_quantization
from mindspeed_lora.checkpoint.loading.random_weights import RandomSource, shape_alone
from mindspeed_lora.checkpoint.peft.plan import plan_adapter
from mindspeed_lora.checkpoint.source import Source, open_source
from mindspeed_lora.config.checks import check_layout, reconcile
from mindspeed_lora.config.jobs import ModelJob
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.config.moe import experts_from_flags, reconcile_experts
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.config.shape_flags import shape_from_flags
from mindspeed_lora.config.stages import LayerPlacement
from mindspeed_lora.data.added_tokens import job_tokenizer
from mindspeed_lora.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """A job's model and how it is cut, without what needs a tokenizer."""

    job: ModelJob
    """With what was resolved on the way."""
    shape: ModelShape
    placement: LayerPlacement
    """The layers of each pipeline stage."""
    source: Source
    adapter: AdapterPlan | None
    quantization: QuantPlan | None
    """The weights that are held quantised; None: none are."""
    notices: tuple[str, ...]


def plan_model(job: ModelJob) -> ModelPlan:
    """Resolves model, layout and adapter.

    Raises:
        Refused: something contradicts, is missing or cannot be.
    """
    notices: list[str] = []
    source, shape = _model(job, notices)
    lora = _with_factors_inside(job, source, notices)
    job = dataclasses.replace(job, lora=lora, parallel=_without_interleaving(job.parallel, notices))
    placement = check_layout(shape, job.parallel)
    adapter = plan_adapter(job.lora, shape, job.compute.seed)
    if adapter is not None:
        check_expert_adapters(adapter.spec, shape)
        shape = adapter.shape
    quantization = plan_quantization(job.quantization, source, shape, adapter.spec if adapter else None)
    notices += quantization.notices if quantization is not None else ()
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


def plan_tokenizer(model: ModelPlan) -> PreTrainedTokenizerBase:
    """The tokenizer of the flags, else the adapter's where it has words of its own, else the one beside the weights.

    Raises:
        Refused: there is none.
    """
    config, source, adapter = model.job.tokenizer, model.source, model.adapter
    own = adapter.tokenizer_folder if adapter is not None else None
    path = config.tokenizer_name_or_path or config.tokenizer_model or own or source.config_dir
    if path is None:
        raise Refused(
            f"{source.path} holds no tokenizer files; name their folder with --tokenizer-name-or-path"
        )
    return job_tokenizer(config, path).loaded


def _with_factors_inside(job: ModelJob, source: Source, notices: list[str]) -> LoraConfig:
    """The LoRA flags; without ``--lora-load`` the adapter is the one beside the base in ``--load``, if there is one.

    Such are the checkpoints of MindSpeed-LLM's LoRA runs without ``--lora-ckpt-filter``.
    """
    lora, load = job.lora, job.checkpoint.load
    inside = getattr(source, "has_unmerged_adapter", False)
    if lora.lora_load is not None:
        if inside and Path(lora.lora_load).resolve() != Path(str(load)).resolve():
            notices.append(
                f"the LoRA factors in --load {load} are left out; those of --lora-load are applied to its base"
            )
        return lora
    if inside and isinstance(source, McoreSource):
        notices.append(f"--load {load} holds LoRA factors beside the base; they are applied")
        return dataclasses.replace(lora, lora_load=load)
    if inside:
        raise Refused(
            f"--load {load}: holds LoRA factors in the torch_dist format, from which they are not read; save it with "
            "--ckpt-format torch, or write its base alone with convert_ckpt.py"
        )
    # A dry run has taken out an adapter that is not there, and assumes one.
    if lora.enabled and load is not None and "lora_load" not in job.given:
        raise Refused(
            f"LoRA flags are given without --lora-load, and --load {load} holds no LoRA factors; name the adapter, or "
            "leave them out"
        )
    return lora


def _without_interleaving(parallel: ParallelConfig, notices: list[str]) -> ParallelConfig:
    """Generation has no micro-batches that could fill the gaps between chunks: each rank holds one."""
    plain = dataclasses.replace(
        parallel, num_layers_per_virtual_pipeline_stage=None, num_virtual_stages_per_pipeline_rank=1
    )
    if plain != parallel:
        notices.append("virtual pipeline stages have no effect on generation")
    return plain


def _model(job: ModelJob, notices: list[str]) -> tuple[Source, ModelShape]:
    """Where the weights come from; in a dry run without them, the shape that the flags tell."""
    num_noops = len(job.parallel.noop_slots)
    if job.checkpoint.load is None and job.runtime.dry_run:
        shape = experts_from_flags(job.experts, shape_from_flags(job.model, num_noops))
        return RandomSource(shape, job.compute.seed, 0.0), shape
    load, dry = job.checkpoint.load, job.runtime.dry_run
    source = (shape_alone(load, notices) if load and dry else None) or _source(job)
    shape, told = reconcile_experts(job.experts, reconcile(job.model, source.shape, num_noops))
    notices += told
    return source, shape


def _source(job: ModelJob) -> Source:
    if job.checkpoint.load is None:
        raise Refused(
            "--load is missing: random weights have nothing to say; name a Hugging Face folder or a Megatron "
            "checkpoint"
        )
    return open_source(job.checkpoint.load, checking=not job.checkpoint.no_checking)
