"""What an adapter is on one model: its pairs of factors, and the base's own tensors that are trained with them.

One description that injection, starting values, reading, writing, merging and reporting share. It is made by
:mod:`mindspeed_lora.checkpoint.peft.description`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, kw_only=True)
class PartSpec:
    """One pair of factors: A and B over a whole linear, or over one of the matrices that are fused in it."""

    module: str
    """Canonical name of the linear (``decoder.layers.3.self_attention.linear_qkv``); of a pair that all experts of a
    layer share it has no expert's number (``decoder.layers.3.mlp.experts.linear_fc1``)."""
    label: str
    """The fused linear's one matrix that it covers (``q_proj``); empty where it covers the linear whole."""
    hf_modules: tuple[str, ...]
    """Full Hugging Face names of the matrices that B's rows are of; several share A. Those of a pair that all experts
    share are of one expert after the other, each with the same B."""
    rank: int
    alpha: float
    scaling: float
    """``α / r``, or ``α / √r`` for rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
    out_features: int
    """Rows of B, in the order of the linear, or of the one matrix."""
    in_features: int

    @property
    def name(self) -> str:
        """Canonical name of the pair; ``.lora_a`` and ``.lora_b`` are its factors."""
        return f"{self.module}.{self.label}" if self.label else self.module

    @property
    def weight(self) -> str:
        """Canonical name of the weight that the pair adds to; the first expert's, of a pair that all experts share."""
        return f"{_OF_ALL_EXPERTS.sub('.experts.local_experts.0.', self.module)}.weight"

    @property
    def linear(self) -> str:
        """Megatron's name of the linear (``linear_qkv``)."""
        return self.module.rpartition(".")[2]

    @property
    def tensors(self) -> dict[str, tuple[int, int]]:
        """Canonical names and shapes of both factors."""
        return {
            f"{self.name}.lora_a": (self.rank, self.in_features),
            f"{self.name}.lora_b": (self.out_features, self.rank),
        }


@dataclass(frozen=True, kw_only=True)
class TrainedTensor:
    """A tensor of the base that is trained with the adapter, wholly or in some of its Hugging Face tensors."""

    name: str
    """Canonical name."""
    size: tuple[int, ...]
    """Without the rows that pad the vocabulary."""
    members: tuple[tuple[str, ...], ...]
    """For each Hugging Face tensor that it is made of, its names in the adapter's file; none where it is frozen."""

    @property
    def is_whole(self) -> bool:
        """Whether no part of it is frozen."""
        return all(self.members)


@dataclass(frozen=True, kw_only=True)
class TokenRowsSpec:
    """Rows of a vocabulary tensor that are trained while the others stay frozen."""

    tensor: str
    """Canonical name of the embedding (which a tied output layer shares), or of the output layer."""
    tokens: tuple[int, ...]
    """The token of each row."""
    width: int
    members: tuple[str, ...]
    """Its names in the adapter's file; all hold the same."""

    @property
    def name(self) -> str:
        """Canonical name of the rows ``[n, h]``."""
        return f"{self.tensor.removesuffix('.weight')}.token_rows"


@dataclass(frozen=True, kw_only=True)
class KeptTensor:
    """A frozen tensor of the base that the adapter's file holds in place of the base's own."""

    name: str
    """Canonical name."""
    members: tuple[str, ...]
    """Its names in the adapter's file; all hold the same."""


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """An adapter on one model."""

    parts: tuple[PartSpec, ...]
    """In the order of the forward pass."""
    dropout: float
    trained: tuple[TrainedTensor, ...] = ()
    """In the order of the forward pass."""
    token_rows: tuple[TokenRowsSpec, ...] = ()
    kept: tuple[KeptTensor, ...] = ()
    untied: bool = False
    """The output layer, tied to the embedding in the base, becomes a tensor of its own."""

    @property
    def tensors(self) -> dict[str, tuple[int, int]]:
        """Canonical names and shapes of all factors."""
        return {name: size for part in self.parts for name, size in part.tensors.items()}

    @cached_property
    def layer_parts(self) -> dict[int | None, tuple[PartSpec, ...]]:
        """The pairs of each layer that has any, by its number; None: those outside of layers."""
        found: dict[int | None, list[PartSpec]] = {}
        for part in self.parts:
            match = _IN_LAYER.match(part.module)
            found.setdefault(None if match is None else int(match[1]), []).append(part)
        return {layer: tuple(parts) for layer, parts in found.items()}

    @cached_property
    def layer_places(self) -> dict[int | None, tuple[PartSpec, ...]]:
        """:attr:`layer_parts` with those of one expert, the first, where each expert has its own."""
        return {
            layer: tuple(part for part in parts if not _OF_A_LATER_EXPERT.search(part.module))
            for layer, parts in self.layer_parts.items()
        }

    @cached_property
    def layer_kinds(self) -> dict[int, int]:
        """Layer → the first layer with pairs of the same places, ranks and sizes."""
        first: dict[tuple[tuple[str, str, int, int, int], ...], int] = {}
        return {
            layer: first.setdefault(
                tuple(
                    (_IN_LAYER.sub("", p.module), p.label, p.rank, p.out_features, p.in_features)
                    for p in parts
                ),
                layer,
            )
            for layer, parts in self.layer_parts.items()
            if layer is not None
        }

    @property
    def moe_shared(self) -> bool:
        """Whether all experts of a layer have one pair of factors for each linear."""
        return any(_OF_ALL_EXPERTS.search(part.module) for part in self.parts)

    @property
    def targets(self) -> tuple[str, ...]:
        """What carries it, by Megatron's names, or by Hugging Face's where a fused linear's matrices stand alone."""
        return tuple(dict.fromkeys(part.label or part.linear for part in self.parts))

    def describe(self) -> str:
        """Rank, alpha and targets in a few words, for a run's first lines."""
        ranks, alphas = (
            _span(values) for values in ([p.rank for p in self.parts], [p.alpha for p in self.parts])
        )
        text = f"r {ranks}, alpha {alphas}, on {' '.join(self.targets)}"
        kinds = dict.fromkeys(_LAYER.sub("", tensor.name) for tensor in self.trained)
        rows = [f"{len(rows.tokens)} rows of {_LAYER.sub('', rows.tensor)}" for rows in self.token_rows]
        besides = ", ".join([*kinds, *rows])
        return f"{text}; also trained: {besides}" if besides else text


_OF_ALL_EXPERTS = re.compile(r"\.experts\.(?=linear_fc[12]$)")
_OF_A_LATER_EXPERT = re.compile(r"\.local_experts\.[1-9]")
_IN_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_LAYER = re.compile(r"^(decoder\.(layers\.\d+\.)?)|\.weight$")


def _span(values: list[int] | list[float]) -> str:
    """One value, or the smallest and the largest."""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
