"""Injection: the target linears of a model are replaced by linears that carry an adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from mindspeed_lora.adapters.inject_experts import with_expert_adapters
from mindspeed_lora.adapters.local_rows import length, local_rows, local_segments
from mindspeed_lora.adapters.lora import (
    ColumnParallelLora,
    LoraPart,
    ParallelLoraLinear,
    ReplicatedLora,
    RowParallelLora,
)
from mindspeed_lora.adapters.router import add_router_adapter
from mindspeed_lora.adapters.schedules.choice import Scheduler
from mindspeed_lora.adapters.spec import AdapterSpec, PartSpec, TokenRowsSpec, TrainedTensor
from mindspeed_lora.models.gpt import GPTModel
from mindspeed_lora.models.linear import ReplicatedLinear
from mindspeed_lora.models.moe.experts import GroupedLinear
from mindspeed_lora.models.moe.router import Router
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
    replaced = []
    routers = [(name, module) for name, module in model.named_modules() if isinstance(module, Router)]
    for name, router in routers:
        for part in by_module.get(canonical_name(name), ()):
            add_router_adapter(router, part, spec.dropout, model.groups.tp_size)
    for name in linears:
        parent_name, _, child = name.rpartition(".")
        parent, canonical = model.get_submodule(parent_name), canonical_name(name)
        base, found = getattr(parent, child), by_module.get(canonical)
        adapted: torch.nn.Module | None = None
        if isinstance(base, GroupedLinear):
            adapted = with_expert_adapters(base, canonical, by_module, spec.dropout, model)
        elif found is not None:
            adapted = _with_adapter(base, found, spec.dropout, model, scheduler)
        if adapted is not None:
            setattr(parent, child, adapted)
            replaced.append(name)
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
    segments = local_segments(tensor.name, model.shape, local_size, model.groups.tp_size)
    places = zip(accumulate((length(s) for s in segments), initial=0), segments, strict=False)
    return [(first, first + length(s)) for first, s in places if tensor.members[s.part]]


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
    config, tp_group = model.config, model.groups.tp_group
    if isinstance(base, ReplicatedLinear):
        return ReplicatedLora(base, built, dropout, config.sequence_parallel, tp_group)
    kind = ColumnParallelLora if column else RowParallelLora
    plan = scheduler.plan(parts[0].linear, weight, column, sum(part.rank for part in parts))
    return kind(base, built, dropout, config.sequence_parallel, tp_group, plan)
