"""What a run prints once at its start: the layout over the ranks, and the share that is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.training import TrainingConfig

_RANKS_SHOWN = 8

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters of the unsharded model, and of what each rank holds of it."""

    total: int
    """Parameters of the whole model with its adapters, each counted once."""
    trainable: int
    """Those of them that are trained."""
    per_rank: tuple[int, ...] = ()
    """What each rank holds, by its number."""


def layout_rows(
    parallel: ParallelConfig, training: TrainingConfig, world_size: int, device: str, compute_dtype: str = ""
) -> list[tuple[str, str]]:
    """The rows of the layout table for these degrees.

    ``device`` is a word for the machine (``cpu``, ``cuda``); ``compute_dtype`` the torch name of the dtype
    that is computed in where it is not the one that was asked for.
    """
    data_parallel = parallel.data_parallel_size(world_size)
    asked = _DTYPES[training.params_dtype]
    used = _DTYPES.get(compute_dtype or training.params_dtype, compute_dtype)
    micro_batches = training.global_batch_size // (training.micro_batch_size * data_parallel)
    return [
        ("world size", f"{world_size} ({device})"),
        ("tensor parallel", str(parallel.tensor_model_parallel_size)),
        ("pipeline parallel", str(parallel.pipeline_model_parallel_size)),
        ("context parallel", _context(parallel)),
        ("data parallel", str(data_parallel)),
        ("sequence parallel", _switch(parallel.sequence_parallel)),
        ("distributed optimizer", _switch(parallel.use_distributed_optimizer)),
        ("recompute", _recompute(training)),
        ("dtype", asked if used == asked else f"{asked}, computed in {used}"),
        ("micro batch size", str(training.micro_batch_size)),
        (
            "global batch size",
            f"{training.global_batch_size} ({micro_batches} micro-batches a step and rank)",
        ),
    ]


def layout_lines(rows: Sequence[tuple[str, str]], counts: ParameterCounts | None) -> list[str]:
    """The table as aligned lines, and below it the share of trained parameters in PEFT's words."""
    table = list(rows)
    if counts is not None:
        table.append(("parameters", f"{counts.total:,} in all"))
        if counts.per_rank:
            table.append(("parameters per rank", _per_rank(counts.per_rank)))
    width = max((len(name) for name, _ in table), default=0)
    lines = [f" {name:<{width}} | {value}" for name, value in table]
    frame = "-" * max((len(line) + 1 for line in lines), default=0)
    lines = [frame, *lines, frame]
    return lines if counts is None else [*lines, trainable_line(counts)]


def trainable_line(counts: ParameterCounts) -> str:
    """The line that PEFT's ``print_trainable_parameters`` prints."""
    share = 100.0 * counts.trainable / counts.total if counts.total else 0.0
    return (
        f"trainable params: {counts.trainable:,d} || all params: {counts.total:,d} || trainable%: {share:.4f}"
    )


def _per_rank(counts: Sequence[int]) -> str:
    if len(set(counts)) == 1:
        return f"{counts[0]:,}"
    if len(counts) <= _RANKS_SHOWN:
        return " / ".join(f"{count:,}" for count in counts)
    return f"{min(counts):,} to {max(counts):,}"


def _context(parallel: ParallelConfig) -> str:
    ulysses, ring = parallel.context_degrees
    if ulysses * ring == 1:
        return "1"
    parts = [f"all-to-all over {ulysses}"] if ulysses > 1 else []
    parts += [f"ring of {ring}"] if ring > 1 else []
    return f"{ulysses * ring} ({', '.join(parts)})"


def _recompute(training: TrainingConfig) -> str:
    granularity = training.recompute_granularity
    if granularity != "full":
        return granularity or "off"
    return f"full, {training.recompute_method or 'uniform'}, {training.recompute_num_layers or 1} layers"


def _switch(on: bool) -> str:
    return "on" if on else "off"
