"""Mappings between one canonical tensor (Megatron-core's, unsharded) and its Hugging Face tensors.

A mapping knows, for its canonical name pattern, the Hugging Face name patterns and in which order their rows
make up the canonical rows. Both directions, biases and adapters follow from that one order:

* :class:`Direct`: the same tensor under another name;
* :class:`GateUp`: all rows of ``gate_proj``, then all of ``up_proj``;
* :class:`QKV`: per query group ``[q_1 … q_rep | k | v]``, each ``kv_channels`` rows.

A fused mapping with one Hugging Face tensor is a packed one: it holds the same parts stacked whole, ``[gate; up]`` or
``[q; k; v]``. A packed tensor that lies in Megatron's order already is :class:`Direct`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.models.families.segments import Range, Segment, part_sizes, pieces

if TYPE_CHECKING:
    import torch

Region = tuple[Range, ...]
"""One half-open range per dimension of a tensor."""


class TensorStore(Protocol):
    """Something that can fill a buffer with a region of a named tensor."""

    def read_into(self, out: torch.Tensor, name: str, region: Region) -> None:
        """Fill ``out`` with ``region`` of tensor ``name``; ``out`` has the region's shape."""


def gather(
    store: TensorStore,
    out: torch.Tensor,
    names: Sequence[str],
    segments: Sequence[Segment],
    cut_axis: int,
    wanted: Sequence[Sequence[Range]],
) -> None:
    """Fill ``out`` with the wanted ranges of a whole whose parts are ``names``, cut along ``cut_axis``.

    ``wanted`` holds, per axis of the whole, the ranges that are concatenated along that axis.
    """
    for part, start, stop, at in pieces(segments, wanted[cut_axis]):
        view = out.narrow(cut_axis, at, stop - start)
        if len(wanted) == 1:
            store.read_into(view, names[part], ((start, stop),))
            continue
        other, offset = 1 - cut_axis, 0
        for low, high in wanted[other]:
            region = ((start, stop), (low, high)) if cut_axis == 0 else ((low, high), (start, stop))
            store.read_into(view.narrow(other, offset, high - low), names[part], region)
            offset += high - low


@dataclass(frozen=True)
class Mapping:
    """One row of a family's table; in both name patterns ``{layer}`` stands for the global layer number.

    ``{expert}`` stands for the global number of an expert.
    """

    canonical: str
    hf: tuple[str, ...]

    def segments(self, shape: ModelShape, rows: int) -> list[Segment]:
        """Rows of the Hugging Face tensors in canonical order; ``rows`` is the canonical tensor's axis 0."""
        parts = self.parts(shape, rows)
        return parts if len(self.hf) > 1 else _stacked(parts)

    def places(self, shape: ModelShape, rows: int) -> list[list[Range]]:
        """Of each Hugging Face tensor the ranges of canonical rows that it is, in its own order."""
        found: dict[int, list[tuple[int, Range]]] = {}
        position = 0
        for part, start, stop in self.segments(shape, rows):
            found.setdefault(part, []).append((start, (position, position + stop - start)))
            position += stop - start
        return [[place for _, place in sorted(found[part])] for part in sorted(found)]

    def parts(self, shape: ModelShape, rows: int) -> list[Segment]:
        """Rows of the matrices that are fused (gate and up; q, k and v) in canonical order."""
        raise NotImplementedError

    def of_expert(self, expert: int) -> Mapping:
        """The row of one expert."""
        return dataclasses.replace(
            self, hf=tuple(pattern.replace("{expert}", str(expert)) for pattern in self.hf)
        )

    def names(self, layer: int | None) -> tuple[str, ...]:
        """Hugging Face tensor names of one layer."""
        return tuple(pattern.format(layer=layer) for pattern in self.hf)

    def modules(self, layer: int | None) -> tuple[str, ...]:
        """Full Hugging Face module names (``model.layers.3.self_attn.q_proj``) of a linear's weight."""
        return tuple(name.removesuffix(".weight") for name in self.names(layer))

    @property
    def targets(self) -> tuple[str, ...]:
        """Last components of the module names (``q_proj``), as PEFT's ``target_modules`` has them."""
        return tuple(pattern.removesuffix(".weight").rpartition(".")[2] for pattern in self.hf)

    def hf_shapes(self, shape: ModelShape, full: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Shapes of the Hugging Face tensors, for the canonical tensor's shape ``full``."""
        return tuple((rows, *full[1:]) for rows in part_sizes(self.segments(shape, full[0])))

    def read(
        self,
        store: TensorStore,
        shape: ModelShape,
        rows: int,
        layer: int | None,
        out: torch.Tensor,
        wanted: Sequence[Sequence[Range]],
    ) -> None:
        """Fill ``out`` with the wanted ranges (per axis) of the canonical tensor that has ``rows`` rows."""
        gather(store, out, self.names(layer), self.segments(shape, rows), 0, wanted)

    def split(self, shape: ModelShape, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cut a canonical tensor ``[rows, …]`` (weight, bias or ``lora_b``) into its Hugging Face tensors."""
        segments = self.segments(shape, tensor.shape[0])
        if len(segments) == 1:
            return (tensor,)
        parts = tuple(tensor.new_empty((rows, *tensor.shape[1:])) for rows in part_sizes(segments))
        for part, start, stop, at in pieces(segments, [(0, tensor.shape[0])]):
            parts[part][start:stop] = tensor[at : at + stop - start]
        return parts

    def join(self, shape: ModelShape, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Build the canonical tensor ``[rows, …]`` from its Hugging Face tensors."""
        rows = sum(part.shape[0] for part in parts)
        segments = self.segments(shape, rows)
        if len(segments) == 1:
            return parts[0]
        whole = parts[0].new_empty((rows, *parts[0].shape[1:]))
        for part, start, stop, at in pieces(segments, [(0, rows)]):
            whole[at : at + stop - start] = parts[part][start:stop]
        return whole


@dataclass(frozen=True)
class Direct(Mapping):
    """One Hugging Face tensor, unchanged."""

    def parts(self, shape: ModelShape, rows: int) -> list[Segment]:
        """All rows in one run."""
        return [Segment(0, 0, rows)]


@dataclass(frozen=True)
class GateUp(Mapping):
    """``linear_fc1`` of a gated MLP: gate above up. TP cuts each of the two stacked blocks by itself."""

    def parts(self, shape: ModelShape, rows: int) -> list[Segment]:
        """All of gate, then all of up."""
        return [Segment(0, 0, rows // 2), Segment(1, 0, rows // 2)]


@dataclass(frozen=True)
class QKV(Mapping):
    """``linear_qkv``: Hugging Face's q, k and v interleaved by query group, as Megatron stores them."""

    def parts(self, shape: ModelShape, rows: int) -> list[Segment]:
        """Per query group the rows of its query heads, then one head of k, then one of v."""
        head = shape.kv_channels
        queries = shape.num_attention_heads // shape.num_query_groups * head
        return [
            segment
            for group in range(shape.num_query_groups)
            for segment in (
                Segment(0, group * queries, (group + 1) * queries),
                Segment(1, group * head, (group + 1) * head),
                Segment(2, group * head, (group + 1) * head),
            )
        ]


def _stacked(parts: Sequence[Segment]) -> list[Segment]:
    """The same rows where the parts lie one below the other in a single tensor; runs that meet are joined."""
    starts = [0, *accumulate(part_sizes(parts))]
    runs: list[Segment] = []
    for part, first, last in parts:
        start, stop = starts[part] + first, starts[part] + last
        if runs and runs[-1].stop == start:
            runs[-1] = Segment(0, runs[-1].start, stop)
        else:
            runs.append(Segment(0, start, stop))
    return runs
