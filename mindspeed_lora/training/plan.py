"""Everything that is decided before processes join: model, adapter, data, length, and where the run starts.

All of it is read from headers and indices, the same on every rank, so that what is wrong is refused before any
process group exists.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_lora.adapters.inject_experts import check_expert_adapters
from mindspeed_lora.checkpoint.loading.model import AdapterPlan
from mindspeed_lora.checkpoint.loading.quantization import QuantPlan, plan_quantization
from mindspeed_lora.checkpoint.loading.random_weights import RandomSource, shape_alone
from mindspeed_lora.checkpoint.peft.adapted import AdaptedSource
from mindspeed_lora.checkpoint.peft.plan import check_tokens, plan_adapter
from mindspeed_lora.checkpoint.peft.token_rows import with_vocabulary
from mindspeed_lora.checkpoint.source import Source, open_source
from mindspeed_lora.config.checks import (
    check_expert_files,
    check_interleaving,
    check_layout,
    check_recompute,
    reconcile,
)
from mindspeed_lora.config.context import check_context, check_fixed_length, variable_multiple
from mindspeed_lora.config.jobs import TrainJob
from mindspeed_lora.config.moe import experts_from_flags, reconcile_experts
from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.config.shape_flags import shape_from_flags
from mindspeed_lora.config.stages import LayerPlacement
from mindspeed_lora.data.added_tokens import job_tokenizer, token_numbers
from mindspeed_lora.data.tokenizer import LazyTokenizer
from mindspeed_lora.errors import Refused
from mindspeed_lora.training.raw_data import with_prepared_rows
from mindspeed_lora.training.rows import TrainingRows, assumed_rows, open_rows
from mindspeed_lora.training.run_folder import SavedRun, Start, find_start, make_save_folder
from mindspeed_lora.training.run_layout import RunLayout
from mindspeed_lora.training.schedule import LearningRate

LONGEST_DEFAULT = 4096
_FILLED = ("lora_r", "lora_alpha", "lora_target_modules")
"""What a new adapter takes a default for."""


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """A job, resolved."""

    job: TrainJob
    shape: ModelShape
    placement: LayerPlacement
    """The layers of each pipeline stage."""
    layout: RunLayout
    source: Source
    adapter: AdapterPlan | None
    quantization: QuantPlan | None
    """The weights that are held quantised; None: none are."""
    start: Start
    rows: TrainingRows
    tokenizer: LazyTokenizer | None
    pad_to: int | None
    """Rows are padded to the longest of the micro-batch in multiples of this; None pads to ``seq_length``."""
    seq_length: int
    num_steps: int
    learning_rate: LearningRate
    paging: Path | None
    """Folder of the optimizer's state where that pages."""
    base_model_name: str | None
    notices: tuple[str, ...]


def plan_training(job: TrainJob) -> TrainPlan:
    """Resolves a job.

    Raises:
        Refused: something contradicts, is missing or cannot be.
    """
    notices: list[str] = []
    start = find_start(job)
    source, shape = _model(job, start, notices)
    placement, dp_size = check_layout(shape, job.parallel), _data_parallel_size(job)
    check_recompute(placement, job.training)
    check_context(shape, job.parallel)
    if not job.data.packing:  # which adds rows of padding where the schedule wants more
        check_interleaving(placement, job.training, dp_size)
    adapter, tokenizer = _adapter_and_tokenizer(job, start, source, shape, notices)
    source, shape = _with_adapter(job, source, shape, adapter, tokenizer)
    quantization = plan_quantization(job.quantization, source, shape, adapter.spec if adapter else None)
    notices += quantization.notices if quantization is not None else ()
    seq_length = _seq_length(job, shape, notices)
    job, told = with_prepared_rows(job, seq_length, tokenizer)
    notices += told
    rows = (open_rows if job.data.data_path or job.data.train_data_path else assumed_rows)(
        job, seq_length, shape.vocab_size, tokenizer
    )
    notices += rows.notices
    num_steps = job.training.num_steps(rows.epoch_samples)
    learning_rate = LearningRate.of(job.training, num_steps)
    pad_to = _pad_multiple(job, seq_length)
    if start.run is not None and start.continues:
        _check_base(quantization, start.run)
        _check_continuation(job, start.run, rows, learning_rate, notices)
    layout = RunLayout.of(job, placement, dp_size)
    start = _in_layout(start, layout, shape, notices)
    if job.checkpoint.save is not None and not job.runtime.dry_run:
        make_save_folder(Path(job.checkpoint.save))
    return TrainPlan(
        job=job,
        shape=shape,
        placement=placement,
        layout=layout,
        source=source,
        adapter=adapter,
        quantization=quantization,
        start=start,
        rows=rows,
        tokenizer=tokenizer,
        pad_to=pad_to,
        seq_length=seq_length,
        num_steps=num_steps,
        learning_rate=learning_rate,
        paging=_paging_folder(job),
        base_model_name=job.checkpoint.base_model_name or source.hf_origin,
        notices=tuple(notices),
    )


def _paging_folder(job: TrainJob) -> Path | None:
    training = job.training
    if not training.paged_optimizer:
        return None
    folder = Path(training.paged_optimizer_dir or job.checkpoint.save or tempfile.gettempdir())
    if training.paged_optimizer_dir is not None and not (job.runtime.dry_run or os.access(folder, os.W_OK)):
        raise Refused(
            f"--paged-optimizer-dir {folder}: no folder that can be written to; name one that is there"
        )
    return folder


def _model(job: TrainJob, start: Start, notices: list[str]) -> tuple[Source, ModelShape]:
    """Where the weights come from. Without LoRA a resumed run holds the model itself."""
    path, num_noops = job.checkpoint.load, len(job.parallel.noop_slots)
    if start.run is not None and not job.lora.enabled:
        path = str(start.run.folder)
    if path is None:
        shape = experts_from_flags(job.experts, shape_from_flags(job.model, num_noops))
        if not job.runtime.dry_run:
            quantised = ", quantised" if job.quantization.quantises else ""
            notices.append(f"--load is left out: the model starts from random weights{quantised}")
        std = job.model.init_method_std
        return RandomSource(shape, job.training.seed, 0.02 if std is None else std), shape
    planned = shape_alone(path, notices) if job.runtime.dry_run else None
    source = planned or open_source(path, checking=not job.checkpoint.no_checking)
    shape, told = reconcile_experts(job.experts, reconcile(job.model, source.shape, num_noops))
    notices += told + (job.routing.notices if shape.moe is not None else [])
    return source, shape


def _with_adapter(
    job: TrainJob,
    source: Source,
    shape: ModelShape,
    adapter: AdapterPlan | None,
    tokenizer: LazyTokenizer | None,
) -> tuple[Source, ModelShape]:
    """The model as it is trained: of its adapter's shape, or with the words that are added to it."""
    if job.checkpoint.save is not None and (adapter is None or job.lora.lora_save_base):
        check_expert_files(shape, job.parallel)
        if job.quantization.quantises and not job.quantization.qlora_save_dequantize:
            raise Refused(
                "--lora-save-base with --qlora saves the frozen model dequantised; add --qlora-save-dequantize to say "
                "so, or drop --lora-save-base (convert_ckpt.py --qlora-nf4 writes quantised models)"
            )
    if adapter is not None:
        check_expert_adapters(adapter.spec, shape)
        return source, adapter.shape
    if job.tokenizer.add_tokens is None:
        return source, shape
    shape = with_vocabulary(shape, token_numbers(job.tokenizer, tokenizer))
    return AdaptedSource(source, shape, None), shape


def _data_parallel_size(job: TrainJob) -> int:
    return job.parallel.data_parallel_size(job.runtime.resolve_world_size(job.parallel, os.environ))


def _adapter_and_tokenizer(
    job: TrainJob, start: Start, source: Source, shape: ModelShape, notices: list[str]
) -> tuple[AdapterPlan | None, LazyTokenizer | None]:
    """A new adapter is told the tokens that are added; one that is loaded may bring a tokenizer of its own."""
    lora, shared, seed = job.lora, None, job.training.seed
    if lora.enabled and start.run is not None:
        # Defaults that were taken for a new adapter say nothing about this one.
        left_out: dict[str, Any] = {name: None for name in _FILLED if name not in job.given}
        lora = dataclasses.replace(lora, lora_load=str(start.run.folder), **left_out)
        shared = start.run.state.get("shared_factors")
    if lora.lora_load is None:
        tokenizer = _tokenizer(job, source.config_dir)
        new = plan_adapter(lora, shape, seed, new_tokens=token_numbers(job.tokenizer, tokenizer))
        notices += new.notices if new is not None else ()
        return new, tokenizer
    adapter = plan_adapter(lora, shape, seed, shared)
    assert adapter is not None
    tokenizer = _tokenizer(job, adapter.tokenizer_folder or source.config_dir)
    check_tokens(adapter, token_numbers(job.tokenizer, tokenizer))
    notices += adapter.notices
    return adapter, tokenizer


def _seq_length(job: TrainJob, shape: ModelShape, notices: list[str]) -> int:
    longest = job.model.max_position_embeddings or shape.max_position_embeddings
    if shape.rope_scaling is not None and shape.rope_scaling.rope_type == "dynamic":
        # Beyond them the frequencies depend on the row's length, which is not built.
        longest = min(longest, shape.max_position_embeddings)
    seq_length = job.data.seq_length
    if seq_length is None:
        seq_length = min(longest, LONGEST_DEFAULT)
        notices.append(f"default taken: --seq-length {seq_length}")
    if seq_length > longest:
        raise Refused(
            f"--seq-length {seq_length} is longer than the model's {longest} positions; "
            f"lower it, or raise --max-position-embeddings"
        )
    return seq_length


def _pad_multiple(job: TrainJob, seq_length: int) -> int | None:
    """Every rank that a row is cut over needs an equal part of it."""
    if job.data.variable_seq_lengths:
        return variable_multiple(job.parallel, job.data.pad_to_multiple_of)
    check_fixed_length(job.parallel, seq_length)
    return None


def _tokenizer(job: TrainJob, own: Path | None) -> LazyTokenizer | None:
    """The tokenizer of the flags, else the one of the model's or adapter's folder; None where there is none."""
    given = job.tokenizer.tokenizer_name_or_path or job.tokenizer.tokenizer_model
    folder = given or own
    if folder is None or (given is None and not (Path(folder) / "tokenizer_config.json").is_file()):
        return None
    return job_tokenizer(job.tokenizer, folder)


def _check_continuation(
    job: TrainJob, run: SavedRun, rows: TrainingRows, learning_rate: LearningRate, notices: list[str]
) -> None:
    """The position in the data is the number of samples taken: it means the same rows only in the same order."""
    training, state = job.training, run.state
    batch = state.get("global_batch_size", training.global_batch_size)
    if batch != training.global_batch_size:
        raise Refused(
            f"--global-batch-size {training.global_batch_size}: {run.folder} was trained with {batch}, and going on "
            f"would repeat or skip rows; give {batch}, or --finetune to start at iteration 0 with its weights"
        )
    notices.append(f"going on after iteration {run.iteration} of {run.folder}")
    ordering = {"seed": training.seed, "documents": len(rows.train), "blend": rows.blend}
    names = {"seed": "--seed", "documents": "number of rows", "blend": "blend of the data"}
    for name, now in ordering.items():
        before = state.get(name, now)
        if before != now:
            what = names[name]
            notices.append(
                f"{what} is {now}, and was {before} before iteration {run.iteration}: the order differs"
            )
    changed = learning_rate.changes(state.get("learning_rate", {}))
    if changed:
        notices.append(
            f"the learning rate goes on by this command's schedule: {', '.join(changed)} (its own curve goes on with "
            "the --train-iters and --lr flags that the run began with)"
        )


def _check_base(quantization: QuantPlan | None, run: SavedRun) -> None:
    """An adapter goes on with the base that it was trained on so far: quantised in the same way, or plain."""
    now = None if quantization is None else quantization.state()
    before = run.state.get("quantization", now)
    if before != now:
        was, is_now = ("plain" if state is None else _told(state) for state in (before, now))
        raise Refused(
            f"{run.folder} was trained on a base that was {was}, and it is {is_now} now; give the same --qlora and "
            "--quant-* flags, or --finetune to start at iteration 0 with its weights"
        )


def _told(state: dict[str, Any]) -> str:
    settings = QuantSettings(**{key: value for key, value in state.items() if key != "weights"})
    return f"quantised ({settings}, {state['weights']} weights)"


def _in_layout(start: Start, layout: RunLayout, shape: ModelShape, notices: list[str]) -> Start:
    """Where the job starts; in another layout than the checkpoint's without its random states.

    Data order and adapter dropout come from the seed and the sample; only the masks of hidden and attention dropout
    are drawn by generators, rank by rank.
    """
    if start.run is None or not start.continues:
        return start
    saved = start.run.state.get("layout", {})
    changes = layout.changes(saved)
    if changes:
        text = f"going on in another layout: {', '.join(changes)}"
        if shape.hidden_dropout or shape.attention_dropout:
            text += "; the masks of hidden and attention dropout are others than they would have been"
        notices.append(text)
    keeps = start.load_random_state and layout.keeps_random_states(saved)
    return dataclasses.replace(start, load_random_state=keeps)
