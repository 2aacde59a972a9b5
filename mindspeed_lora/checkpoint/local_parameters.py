"""A rank's parameters in canonical terms: which ranges of which canonical tensor each of them holds.

Loading, the optimizer and saving all work on this one description, so that none of them knows a layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mindspeed_lora.checkpoint.canonical import (
    EMBEDDING,
    OUTPUT_LAYER,
    VOCABULARY_TENSORS,
    shard_ranges,
    tensor_rule,
    to_canonical,
)
from mindspeed_lora.models.gpt import GPTModel


@dataclass(frozen=True)
class LocalParameter:
    """One parameter of this rank."""

    name: str
    """Canonical name."""
    local_name: str
    param: torch.nn.Parameter
    axis: int | None
    """The axis that TP cuts, or None."""
    ranges: tuple[tuple[int, int], ...]
    """What this rank holds of the whole tensor along ``axis`` (padded vocabulary included)."""
    shape: tuple[int, ...]
    """Of the whole tensor, with the padded vocabulary."""
    partial_over_tp: bool
    """The gradient of a backward pass is a partial sum over TP."""
    counted: bool
    """This rank counts it in the global norm (one of several equal copies does)."""
    shared_embedding: bool
    """Held by the first and the last stage; their gradients are summed."""

    @property
    def num_trained(self) -> int:
        """Elements that are trained: all, none, or those of some rows."""
        if not self.param.requires_grad:
            return 0
        rows = getattr(self.param, "trained_rows", None)
        return self.param.numel() if rows is None else sum(stop - start for start, stop in rows)

    @property
    def is_adapter(self) -> bool:
        """True for a LoRA factor, and for trained rows of single tokens: what the base does not have."""
        return self.name.rpartition(".")[2] in ("lora_a", "lora_b", "token_rows")


def local_parameters(model: GPTModel) -> list[LocalParameter]:
    """All parameters of this chunk, in the module's order."""
    return list(_describe(model))


def trainable(parameters: list[LocalParameter]) -> list[LocalParameter]:
    """Those that are trained."""
    return [parameter for parameter in parameters if parameter.param.requires_grad]


def canonical_name(model: GPTModel, local_name: str) -> str:
    """Canonical name of a module or of a parameter of the base."""
    name = to_canonical(local_name, model.chunk.slots)
    return EMBEDDING if model.share_embeddings_and_output_weights and name == OUTPUT_LAYER else name


def _describe(model: GPTModel) -> Iterator[LocalParameter]:
    groups = model.groups
    for local_name, param in model.named_parameters():
        # Factors of an adapter are given their names where they are made.
        name = getattr(param, "canonical_name", None) or canonical_name(model, local_name)
        rule = tensor_rule(name)
        shape = list(param.shape)
        ranges: list[tuple[int, int]] = []
        if rule.axis is not None:
            shape[rule.axis] *= groups.tp_size
            ranges = shard_ranges(rule, shape[rule.axis], groups.tp_rank, groups.tp_size)
        second_copy = bool(getattr(param, "shared", False))
        yield LocalParameter(
            name=name,
            local_name=local_name,
            param=param,
            axis=rule.axis,
            ranges=tuple(ranges),
            shape=tuple(shape),
            partial_over_tp=groups.tp_size > 1
            and bool(getattr(param, "partial_over_tp", False) or getattr(param, "sequence_parallel", False)),
            counted=(rule.axis is not None or groups.tp_rank == 0) and not second_copy,
            shared_embedding=bool(getattr(param, "shared_embedding", False)),
        )


def is_vocabulary(name: str) -> bool:
    """True for tensors whose rows are padded to the layout's vocabulary."""
    return name in VOCABULARY_TENSORS
