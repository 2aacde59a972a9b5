"""The rules that span several flags of a training run: defaults that are taken, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mindspeed_lora.config.blend import parse_blend, with_listed_data
from mindspeed_lora.config.jobs import LayoutPlanJob, TrainJob
from mindspeed_lora.config.launcher import restart_count
from mindspeed_lora.config.lora import FUSION_PLANS, FUSION_WEIGHTS, LoraConfig
from mindspeed_lora.config.resolve import (
    check_precision,
    check_template,
    given_lora,
    refuse_placeholders,
    require,
)
from mindspeed_lora.config.resolve_quantization import check_quantization
from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.errors import Refused

LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Megatron's names of the linears that take an adapter."""

DEFAULT_LORA_R = 16
DEFAULT_EPOCHS = 3.0
DEFAULT_WARMUP_FRACTION = 0.03


def resolve_training(job: TrainJob, environ: Mapping[str, str]) -> TrainJob:
    """Fill in what was left out, tell it as notices, and refuse what contradicts itself.

    ``--print-config`` stops before all that depends on the launch or on the user's own paths.
    """
    if job.data.is_instruction_dataset and job.training.stage == "pretrain" and "stage" not in job.given:
        told_stage = "default taken: --stage sft, since --is-instruction-dataset says that the data are rows"
        training = dataclasses.replace(job.training, stage="sft")
        job = dataclasses.replace(job, training=training, notices=(*job.notices, told_stage))
    if not job.runtime.print_config:
        data, told = with_listed_data(job.data, job.runtime.dry_run)
        job = dataclasses.replace(job, data=data, notices=(*job.notices, *told))
    lora, lora_defaults = _fill_lora(job)
    # How many rows all ranks take at once; nobody knows where only the configuration is printed.
    at_once = 1 if job.runtime.print_config else _rows_at_once(job, environ)
    training, training_defaults = _fill_training(job, at_once)
    job = dataclasses.replace(job, lora=lora, training=training)
    job = dataclasses.replace(job, notices=(*job.notices, *_notices(job, training_defaults + lora_defaults)))
    check_precision(training)
    check_template(job.tokenizer)
    _check_schedule(job)
    check_quantization(job.quantization)
    _check_fusion(lora)
    _check_recompute(training)
    if job.parallel.overlap_param_gather and not job.parallel.use_distributed_optimizer:
        raise Refused(
            "--overlap-param-gather hides the gathering of what the distributed optimizer cuts; add "
            "--use-distributed-optimizer, or drop it"
        )
    if training.paged_optimizer_dir is not None and not training.paged_optimizer:
        raise Refused(
            f"--paged-optimizer-dir {training.paged_optimizer_dir} is for the file of --paged-optimizer, which is "
            "not given; add it"
        )
    if training.manual_gc_interval and not training.manual_gc:
        raise Refused(
            f"--manual-gc-interval {training.manual_gc_interval} is for --manual-gc, which is not given; add it"
        )
    _check_saving(job)
    _check_packing(job)
    _check_data(job)
    if job.runtime.print_config:
        return job
    job = _after_restart(job, environ)
    _check_batch(training, at_once)
    if not job.runtime.dry_run:
        if job.data.train_data_path is None:
            require(job.data, "data_path")
        refuse_placeholders(job)
    if job.checkpoint.load is None and job.checkpoint.exit_on_missing_checkpoint:
        raise Refused("--exit-on-missing-checkpoint is given without --load; name the model")
    return job


def resolve_layout_plan(job: LayoutPlanJob) -> LayoutPlanJob:
    """Check what a layout is planned for; without ``--full`` an adapter is trained."""
    plan, machine = job.plan, job.machine
    check_quantization(job.quantization)
    if plan.full and (given_lora(job) or job.quantization.quantises):
        raise Refused("--full trains all parameters, but LoRA or quantised weights are asked for; drop one")
    if not job.runtime.print_config:
        require(plan, "model")
        require(machine, "gpus")
    gpus, per_node = machine.gpus or 1, machine.gpus_per_node
    if gpus > per_node and gpus % per_node:
        raise Refused(
            f"--gpus {gpus} is no multiple of --gpus-per-node {per_node}; plan for whole nodes, or change it"
        )
    if "global_batch_size" not in job.given and plan.global_batch_size % gpus:
        rows = -(-plan.global_batch_size // gpus) * gpus
        told = f"default taken: --global-batch-size {rows}, of which {gpus} GPUs get as many each"
        plan = dataclasses.replace(plan, global_batch_size=rows)
        job = dataclasses.replace(job, plan=plan, notices=(*job.notices, told))
    if plan.full or job.lora.lora_load is not None:
        return job
    filled, taken = _new_adapter(job.lora)
    notices = [*job.notices, f"defaults taken: {', '.join(taken)}"] if taken else job.notices
    return dataclasses.replace(job, lora=filled, notices=tuple(notices))


def _fill_lora(job: TrainJob) -> tuple[LoraConfig, list[str]]:
    """A new adapter's rank, alpha and targets; those of ``--lora-load`` are left to the adapter's files.

    Quantised weights are frozen, so ``--qlora`` alone asks for an adapter too.
    """
    lora = job.lora
    if not (given_lora(job) or job.quantization.quantises) or lora.lora_load is not None:
        return lora, []
    return _new_adapter(lora)


def _new_adapter(lora: LoraConfig) -> tuple[LoraConfig, list[str]]:
    rank = DEFAULT_LORA_R if lora.lora_r is None else lora.lora_r
    defaults: dict[str, Any] = {"lora_r": rank, "lora_alpha": 2 * rank, "lora_target_modules": LORA_TARGETS}
    taken = {name: value for name, value in defaults.items() if getattr(lora, name) is None}
    return dataclasses.replace(lora, **taken), [_described(name, value) for name, value in taken.items()]


def _rows_at_once(job: TrainJob, environ: Mapping[str, str]) -> int:
    """Those of one micro-batch of every data-parallel rank."""
    world_size = job.runtime.resolve_world_size(job.parallel, environ)
    return job.training.micro_batch_size * job.parallel.data_parallel_size(world_size)


def _fill_training(job: TrainJob, rows_at_once: int) -> tuple[TrainingConfig, list[str]]:
    """The schedule and the length of the run; the default of the global batch is rounded up to what divides."""
    training = job.training
    taken: dict[str, Any] = {
        name: getattr(training, name)
        for name in ("lr", "lr_decay_style", "micro_batch_size", "global_batch_size")
        if name not in job.given
    }
    if "global_batch_size" in taken:
        taken["global_batch_size"] = math.ceil(training.global_batch_size / rows_at_once) * rows_at_once
    if training.lr_warmup_fraction is None and training.lr_warmup_iters is None:
        taken["lr_warmup_fraction"] = DEFAULT_WARMUP_FRACTION
    if training.train_iters is None and training.train_samples is None and training.epochs is None:
        taken["epochs"] = DEFAULT_EPOCHS
    if training.recompute_activations and training.recompute_granularity is None:
        taken["recompute_granularity"] = "selective"
    if training.recompute_granularity == "full":
        if training.recompute_method is None:
            taken["recompute_method"] = "uniform"
        if training.recompute_num_layers is None:
            taken["recompute_num_layers"] = 1
    return dataclasses.replace(training, **taken), [_described(name, value) for name, value in taken.items()]


def _described(name: str, value: Any) -> str:
    words = value if isinstance(value, tuple) else (f"{value:g}" if isinstance(value, float) else value,)
    return " ".join(["--" + name.replace("_", "-"), *map(str, words)])


def _notices(job: TrainJob, defaults: list[str]) -> list[str]:
    notices = [f"defaults taken: {', '.join(defaults)}"] if defaults else []
    if job.checkpoint.save is not None and job.checkpoint.save_interval is None:
        notices.append("no --save-interval: one checkpoint, at the end; a run that is killed before has none")
    if job.runtime.dry_run and job.checkpoint.save is None and job.checkpoint.save_interval is not None:
        notices.append("--save-interval is given without --save: the run itself needs the name of its folder")
    if job.data.packing and not job.data.variable_seq_lengths:
        notices.append("--packing without --variable-seq-lengths pads each packed row to --seq-length")
    if (
        job.parallel.ulysses_degree_in_cp is not None
        and job.parallel.context_parallel_algo != "hybrid_cp_algo"
    ):
        notices.append(
            "--ulysses-degree-in-cp has an effect with --context-parallel-algo hybrid_cp_algo only"
        )
    if job.training.eval_iters and not has_validation(job):
        notices.append(
            f"--eval-iters {job.training.eval_iters}: no evaluation, since --split {job.data.split} leaves "
            "no validation part and --valid-data-path is not given"
        )
    return notices


def has_validation(job: TrainJob) -> bool:
    """Whether the job names rows for an evaluation: a second share of the split, or data of their own."""
    return job.data.valid_data_path is not None or has_share(job, 1)


def has_share(job: TrainJob, part: int) -> bool:
    """Whether ``--split`` gives a part (0 training, 1 validation, 2 test) any of ``--data-path``."""
    shares = [float(share) for share in job.data.split.split(",")]
    return job.data.train_data_path is None and len(shares) > part and shares[part] > 0


def _check_fusion(lora: LoraConfig) -> None:
    """``--lora-fusion`` and what its other flags may say together."""
    plan = lora.lora_fusion_plan or ()
    given = {
        f"--lora-fusion-plan {' '.join(plan)}": bool(plan),
        f"--lora-fusion-chunks {lora.lora_fusion_chunks}": lora.lora_fusion_chunks is not None,
        "--lora-fusion-interleave": lora.lora_fusion_interleave,
    }
    for words, is_given in given.items():
        if is_given and not lora.lora_fusion:
            raise Refused(f"{words} says how --lora-fusion works, which is not given; add it")
    for kind in (FUSION_PLANS, FUSION_WEIGHTS):
        both = [word for word in plan if word in kind]
        if len(both) > 1:
            raise Refused(f"--lora-fusion-plan {' '.join(plan)}: give one of {', '.join(both)}")
    if "overlapped" in plan and (lora.lora_fusion_chunks or lora.lora_fusion_interleave):
        words = "--lora-fusion-interleave" if lora.lora_fusion_interleave else "--lora-fusion-chunks"
        raise Refused(
            f"{words} is of the one-collective schedule, and --lora-fusion-plan {' '.join(plan)} asks for the "
            "other one; drop one of them"
        )


def _check_schedule(job: TrainJob) -> None:
    """Length, learning rate and loss."""
    training = job.training
    lengths = [
        name for name in ("train_iters", "train_samples", "epochs") if getattr(training, name) is not None
    ]
    if len(lengths) > 1:
        both = " and ".join(_described(name, getattr(training, name)) for name in lengths)
        raise Refused(f"{both} both set the length of the run; give one of them")
    if training.lr_warmup_fraction and training.lr_warmup_iters:
        raise Refused(
            f"--lr-warmup-fraction {training.lr_warmup_fraction:g} and --lr-warmup-iters "
            f"{training.lr_warmup_iters} both set the warm-up; give one of them"
        )
    if training.min_lr > training.lr:
        raise Refused(f"--min-lr {training.min_lr:g} is above --lr {training.lr:g}; lower it")
    if training.train_iters is not None:
        training.warmup_steps(training.train_iters)
    if training.calculate_per_token_loss and training.loss_normalization != "token":
        raise Refused("--calculate-per-token-loss contradicts --loss-normalization micro-batch; drop one")
    if training.stage == "pretrain" and job.data.is_instruction_dataset:
        raise Refused(
            "--is-instruction-dataset: pretraining reads plain text; use posttrain_gpt.py --stage sft"
        )


def _after_restart(job: TrainJob, environ: Mapping[str, str]) -> TrainJob:
    """``--resume auto`` by itself where the launcher has started the job anew; other flags tell of its first start."""
    count = restart_count(environ)
    if not count or job.checkpoint.save is None or job.checkpoint.resume is not None or job.runtime.dry_run:
        return job
    return dataclasses.replace(
        job,
        checkpoint=dataclasses.replace(job.checkpoint, resume="auto"),
        notices=(*job.notices, f"restart {count} of this job: --resume auto is taken"),
    )


def _check_data(job: TrainJob) -> None:
    """What the flags of data paths say."""
    data = job.data
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        words = getattr(data, name)
        if words is not None:
            parse_blend(words, "--" + name.replace("_", "-"))
    if data.test_data_path is not None and not job.training.eval_iters:
        raise Refused(
            "--test-data-path is given, but --eval-iters says that nothing is evaluated; give the number of global "
            "batches (-1: all), or leave it out"
        )


def _check_packing(job: TrainJob) -> None:
    """Flags of rows put together, against the stage and the mean of the loss."""
    data, training = job.data, job.training
    if training.stage == "pretrain" and (data.packing or data.neat_pack):
        name = "--packing" if data.packing else "--neat-pack"
        raise Refused(
            f"{name} is for instruction rows, and plain text fills its windows anyway; leave it out, or give "
            "--reset-attention-mask to keep its documents apart"
        )
    if training.stage != "pretrain" and data.eod_mask_loss:
        raise Refused(
            "--eod-mask-loss is for plain text (pretrain_gpt.py); the labels of instruction rows say what "
            "carries loss, leave it out"
        )
    if data.packing and training.loss_normalization == "micro-batch":
        raise Refused(
            "--packing with --loss-normalization micro-batch: the mean of micro-batch means would depend on how "
            "rows are packed; use --loss-normalization token"
        )


def _check_recompute(training: TrainingConfig) -> None:
    if training.recompute_activations and training.recompute_granularity == "full":
        raise Refused("--recompute-activations contradicts --recompute-granularity full; drop one")
    details = [
        _described(name, getattr(training, name))
        for name in ("recompute_method", "recompute_num_layers")
        if getattr(training, name) is not None
    ]
    if details and training.recompute_granularity != "full":
        raise Refused(
            f"{', '.join(details)}: only with --recompute-granularity full; add it or leave them out"
        )


def _check_saving(job: TrainJob) -> None:
    """Flags that mean nothing without ``--save`` or without an evaluation."""
    checkpoint, training = job.checkpoint, job.training
    needs_save = {
        # A dry run takes published scripts, some of which leave the folder to the user.
        "--save-interval": checkpoint.save_interval is not None and not job.runtime.dry_run,
        "--save-total-limit": checkpoint.save_total_limit is not None,
        "--save-best": checkpoint.save_best,
        "--resume auto": checkpoint.resume is not None,
        "--overwrite": checkpoint.overwrite,
        "--exit-duration-in-mins": training.exit_duration_in_mins is not None,
        "--exit-interval": training.exit_interval is not None,
    }
    for name, is_given in needs_save.items():
        if is_given and checkpoint.save is None:
            raise Refused(f"{name} is given without --save; name the folder of the run")
    if checkpoint.resume is not None and checkpoint.overwrite:
        raise Refused(
            "--resume auto goes on with the run in --save and --overwrite replaces it; give one of them"
        )
    needs_evaluation = {
        "--save-best": checkpoint.save_best,
        "--early-stopping-patience": training.early_stopping_patience is not None,
    }
    for name, is_given in needs_evaluation.items():
        if is_given and not (training.eval_iters and has_validation(job)):
            raise Refused(
                f"{name} needs an evaluation: give --eval-iters (-1: all) and --valid-data-path or a --split "
                "with a validation part"
            )


def _check_batch(training: TrainingConfig, rows_at_once: int) -> None:
    """Global batch against micro-batch and data-parallel size."""
    if training.global_batch_size % rows_at_once:
        above = (training.global_batch_size // rows_at_once + 1) * rows_at_once
        raise Refused(
            f"--global-batch-size {training.global_batch_size} is not divisible by --micro-batch-size "
            f"{training.micro_batch_size} x data-parallel size {rows_at_once // training.micro_batch_size} = "
            f"{rows_at_once}; use for example {above}"
        )
