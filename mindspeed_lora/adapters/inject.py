"""Injection: the target linears of a model are replaced by linears that carry an adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from mindspeed_lora.adapters.lora import ColumnParallelLora, LoraPart, ParallelLoraLinear, RowParallelLora
from mindspeed_lora.adapters.schedules.choice import Scheduler
from mindspeed_lora.adapters.side_branch import RowBlock
from mindspeed_lora.adapters.spec import AdapterSpec, PartSpec, TokenRowsSpec, TrainedTensor
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.models.families import FAMILIES
from mindspeed_lora.models.families.segments import Segment
from mindspeed_lora.models.gpt import GPTModel
from mindspeed_lora.models.token_rows import TokenRows, TokenRowsEmbedding

EMBEDDING = "embedding.word_embeddings.weight"
"""Canonical name of the embedding."""


def inject_adapters(
    model: GPTModel,
    spec: AdapterSpec,
    canonical_name: Callable[[str], str],
    scheduler: Scheduler | None = None,
) -> list[str]:
    """Freezes the model, gives each target linear of it its adapter, and thaws what is trained besides.

    Values are filled in afterwards: A stays uninitialised until it is drawn or read, B is zero. Each factor's
    canonical name is its attribute ``canonical_name``.

    Args:
        model: one chunk of the model; what the others hold of the adapter is passed over.
        spec: the whole adapter.
        canonical_name: the canonical name of a module of this chunk, of its local name.
        scheduler: which schedule each linear runs; None: unfused.

    Returns:
        The local names of the linears that were replaced.
    """
    scheduler = scheduler or Scheduler()
    model.requires_grad_(False)
    by_module: dict[str, list[PartSpec]] = {}
    for part in spec.parts:
        by_module.setdefault(part.module, []).append(part)
    linears = [name for name, _ in model.named_modules() if name.rpartition(".")[2].startswith("linear_")]
    replaced = [name for name in linears if canonical_name(name) in by_module]
    for name in replaced:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        parts = by_module[canonical_name(name)]
        setattr(parent, child, _with_adapter(getattr(parent, child), parts, spec.dropout, model, scheduler))
    _train_with_it(model, spec, canonical_name)
    _add_token_rows(model, spec)
    return replaced


def _add_token_rows(model: GPTModel, spec: AdapterSpec) -> None:
    """Gives embedding and output layer of this chunk the rows of single tokens that are trained."""
    tied = model.share_embeddings_and_output_weights
    for rows_spec in spec.token_rows:
        of_embedding = rows_spec.tensor == EMBEDDING
        if of_embedding and model.pre_process:
            base = model.embedding.word_embeddings
            rows = _token_rows(rows_spec, model, base.weight)
            model.embedding.word_embeddings = TokenRowsEmbedding(base, rows)
            if tied and model.post_process:
                model.output_rows = rows
        elif model.post_process and (tied or not of_embedding):
            model.output_rows = _token_rows(rows_spec, model, model.output_weight())


def _token_rows(spec: TokenRowsSpec, model: GPTModel, weight: torch.Tensor) -> TokenRows:
    rows = TokenRows(spec.tokens, model.vocab_range, weight)
    param: Any = rows.token_rows
    param.canonical_name = spec.name
    param.partial_over_tp = True
    if model.share_embeddings_and_output_weights and not (model.pre_process and model.post_process):
        # Both ends of the pipeline hold them, as they do the embedding.
        param.shared_embedding, param.shared = True, not model.pre_process
    return rows


def _train_with_it(model: GPTModel, spec: AdapterSpec, canonical_name: Callable[[str], str]) -> None:
    """Thaws the tensors of the base that are trained with the adapter.

    One of which only some rows are trained is told which: its attribute ``trained_rows``.
    """
    trained = {tensor.name: tensor for tensor in spec.trained}
    for local_name, param in model.named_parameters():
        tensor = None if hasattr(param, "canonical_name") else trained.get(canonical_name(local_name))
        if tensor is not None:
            param.requires_grad_(True)
            if not tensor.is_whole:
                param.trained_rows = _trained_rows(tensor, model, param.size(0))


def _trained_rows(tensor: TrainedTensor, model: GPTModel, local_size: int) -> list[tuple[int, int]]:
    """Ranges of this rank's rows that belong to the Hugging Face tensors that are trained."""
    segments = _local_segments(tensor.name, model.shape, local_size, model.groups.tp_size)
    places = zip(accumulate((_length(s) for s in segments), initial=0), segments, strict=False)
    return [(first, first + _length(s)) for first, s in places if tensor.members[s.part]]


def _with_adapter(
    base: torch.nn.Module,
    parts: Sequence[PartSpec],
    dropout: float,
    model: GPTModel,
    scheduler: Scheduler,
) -> ParallelLoraLinear:
    weight: torch.Tensor = base.weight  # type: ignore[assignment]
    column = isinstance(base, ColumnParallelLinear)
    built = []
    for spec in parts:
        rows = local_rows(spec, model.shape, weight.size(0), model.groups.tp_size)
        part = LoraPart(spec.rank, weight.size(1), rows, spec.scaling, weight.dtype, weight.device)
        part.lora_a.canonical_name = f"{spec.name}.lora_a"  # type: ignore[attr-defined]
        part.lora_b.canonical_name = f"{spec.name}.lora_b"  # type: ignore[attr-defined]
        built.append(part)
    kind = ColumnParallelLora if column else RowParallelLora
    plan = scheduler.plan(parts[0].linear, weight, column, sum(part.rank for part in parts))
    return kind(base, built, dropout, model.config.sequence_parallel, model.groups.tp_group, plan)


def local_rows(spec: PartSpec, shape: ModelShape, local_size: int, tp_size: int) -> RowBlock:
    """The rows of a TP rank's shard, of ``local_size`` rows, that a pair of factors adds to."""
    if not spec.label:
        return RowBlock(0, local_size)
    weight = f"{spec.module}.weight"
    mapping, layer = FAMILIES[shape.family].mapping(weight)
    segments = _local_segments(weight, shape, local_size, tp_size)
    return _row_block(segments, mapping.modules(layer).index(spec.hf_modules[0]))


def _local_segments(name: str, shape: ModelShape, local_size: int, tp_size: int) -> list[Segment]:
    """Rows of the Hugging Face tensors in a TP rank's shard: it holds whole query groups, as a smaller model does."""
    local_shape = dataclasses.replace(
        shape,
        num_attention_heads=shape.num_attention_heads // tp_size,
        num_query_groups=shape.num_query_groups // tp_size,
    )
    return FAMILIES[shape.family].mapping(name)[0].segments(local_shape, local_size)


def _length(segment: Segment) -> int:
    return segment.stop - segment.start


def _row_block(segments: Sequence[Segment], part: int) -> RowBlock:
    """Where the rows of one part of a fused matrix stand in it."""
    places, position = [], 0
    for segment in segments:
        length = _length(segment)
        if segment.part == part:
            places.append((position, position + length))
        position += length
    (start, stop), *others = places
    stride = others[0][0] - start if others else 0
    block = RowBlock(start, stop, len(places), stride)
    assert all(place == (start + i * stride, stop + i * stride) for i, place in enumerate(places))
    return block
