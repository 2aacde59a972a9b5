"""A rank's parameters in canonical terms: which ranges of which canonical tensor each of them holds.

Loading, the optimizer and saving all work on this one description, so that none of them knows a layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

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
from mindspeed_lora.quantization.shard import QuantizedWeight


@dataclass(frozen=True)
class LocalParameter:
    """One parameter of this rank, or quantised weight: a canonical tensor's shard, or those of several experts,
    stacked.
    """

    name: str
    """Canonical name; of a stack the name without the experts' numbers."""
    members: tuple[str, ...]
    """Canonical names of the tensors that it is made of: itself, or one of each expert, in the order of axis 0."""
    local_name: str
    param: torch.nn.Parameter
    """Of a quantised weight the module that stands for it, which answers what is asked of a frozen parameter."""
    axis: int | None
    """The axis of a canonical tensor that TP (of an expert: ETP) cuts, or None."""
    ranges: tuple[tuple[int, int], ...]
    """What this rank holds of a whole tensor along ``axis`` (padded vocabulary included)."""
    shape: tuple[int, ...]
    """Of a whole canonical tensor, with the padded vocabulary."""
    partial_over_tp: bool
    """The gradient of a backward pass is a partial sum over TP."""
    partial_over_etp: bool
    partial_over_ep: bool
    counted: bool
    """This rank counts it in the global norm (of the equal copies within a replica one does)."""
    copy_rank: int
    """Number of this rank among those that hold the same and see other data; 0 writes for all."""
    shared_embedding: bool
    """Held by the first and the last stage; their gradients are summed."""

    @property
    def is_stack(self) -> bool:
        """Whether axis 0 of the parameter counts experts."""
        return self.param.dim() > len(self.shape)

    @property
    def is_quantized(self) -> bool:
        """Whether it is a quantised weight."""
        return isinstance(self.param, QuantizedWeight)

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
    """All parameters of this chunk, in the module's order; then its quantised weights."""
    return list(_describe(model))


def trainable(parameters: list[LocalParameter]) -> list[LocalParameter]:
    """Those that are trained."""
    return [parameter for parameter in parameters if parameter.param.requires_grad]


def canonical_name(model: GPTModel, local_name: str) -> str:
    """Canonical name of a module or of a parameter of the base."""
    name = to_canonical(local_name, model.chunk.slots)
    return EMBEDDING if model.share_embeddings_and_output_weights and name == OUTPUT_LAYER else name


def _describe(model: GPTModel) -> Iterator[LocalParameter]:
    groups, experts = model.groups, model.groups.experts
    quantized: Iterator[tuple[str, Any]] = (
        (name, module) for name, module in model.named_modules() if isinstance(module, QuantizedWeight)
    )
    for local_name, param in chain(model.named_parameters(), quantized):
        # Factors of an adapter are given their names where they are made.
        name = getattr(param, "canonical_name", None) or canonical_name(model, local_name)
        of_experts = is_of_experts(name)
        members: tuple[str, ...] = (name,)
        if of_experts and is_stacked(param):
            assert model.shape.moe is not None
            members = experts.names(model.shape.moe.num_experts, name)
        size, rank = (experts.etp_size, experts.etp_rank) if of_experts else (groups.tp_size, groups.tp_rank)
        rule = tensor_rule(members[0])
        shape = list(param.shape[1:] if len(param.shape) > 2 else param.shape)
        ranges: list[tuple[int, int]] = []
        if rule.axis is not None:
            shape[rule.axis] *= size
            ranges = shard_ranges(rule, shape[rule.axis], rank, size)
        second_copy = bool(getattr(param, "shared", False))
        partial_over_ep = of_experts and not is_stacked(param) and experts.ep_size > 1
        yield LocalParameter(
            name=name,
            members=members,
            local_name=local_name,
            param=param,
            axis=rule.axis,
            ranges=tuple(ranges),
            shape=tuple(shape),
            partial_over_tp=groups.tp_size > 1
            and not of_experts
            and bool(getattr(param, "partial_over_tp", False) or getattr(param, "sequence_parallel", False)),
            partial_over_etp=of_experts and experts.etp_size > 1 and rule.axis is None,
            partial_over_ep=partial_over_ep,
            counted=(rule.axis is not None or rank == 0)
            and not second_copy
            and not (partial_over_ep and experts.ep_rank > 0),
            copy_rank=experts.edp_rank if of_experts else groups.dp_cp_rank,
            shared_embedding=bool(getattr(param, "shared_embedding", False)),
        )


def is_of_experts(name: str) -> bool:
    """True for what lies in the experts of a layer, stacked or one factor for all of them."""
    return ".mlp.experts." in name


def is_stacked(param: torch.nn.Parameter) -> bool:
    """True for a parameter whose axis 0 counts experts: an expert's own tensors are matrices."""
    return param.dim() == 3


def is_vocabulary(name: str) -> bool:
    """True for tensors whose rows are padded to the layout's vocabulary."""
    return name in VOCABULARY_TENSORS
