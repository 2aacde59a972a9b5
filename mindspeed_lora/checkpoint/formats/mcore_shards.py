"""The rank files of a Megatron checkpoint as one store of canonical tensors, each cut over its ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.checkpoint.canonical import (
    VOCABULARY_TENSORS,
    TensorRule,
    expert_number,
    layer_number,
    to_canonical,
)
from mindspeed_lora.checkpoint.formats.mcore_experts import (
    ExpertRanks,
    Transposed,
    is_grouped,
    unstacked,
    with_expert,
)
from mindspeed_lora.checkpoint.formats.mcore_files import RankFiles, chunks
from mindspeed_lora.checkpoint.formats.mcore_latent import latent_entries
from mindspeed_lora.checkpoint.storage.pt_file import PtFile
from mindspeed_lora.checkpoint.storage.safetensors_file import TensorEntry
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families.mapping import Region
from mindspeed_lora.models.families.segments import Segment

Select = Callable[[Any, Path], Mapping[str, torch.Tensor]]
"""Picks tensors of one kind out of a model chunk; see :mod:`mindspeed_lora.checkpoint.formats.mcore_names`."""


class Shards:
    """All ranks' tensors of one kind as one store; its names are ``<rank>:<canonical name>``.

    The rank of an expert's tensor is the expert-tensor-parallel one, of all others the tensor-parallel one.
    """

    def __init__(self, ranks: RankFiles, shape: ModelShape, select: Select) -> None:
        self.entries: dict[str, list[TensorEntry]] = {}
        """Canonical name → one entry per rank."""
        self.stages: list[list[tuple[int, ...]]] = [[] for _ in range(ranks.pp_size)]
        """The layers of each pipeline rank, by virtual stage."""
        self._shape = shape
        self.experts = ranks.expert_ranks()
        """How the experts are cut over the files."""
        self._num_local = 0 if shape.moe is None else _num_local(ranks, self.experts, shape.moe.num_experts)
        self._found: dict[str, dict[int, tuple[TensorEntry, PtFile]]] = defaultdict(dict)
        for tp_rank, ep_rank in ranks.columns:
            self._add(tp_rank, ep_rank, ranks, select)
        for name, found in self._found.items():
            self.entries[name] = [found[rank][0] for rank in sorted(found)]
            if sorted(found) != list(range(len(found))):
                path = found[max(found)][1].path
                kind = "tensor" if expert_number(name) is None else "expert-tensor"
                raise Refused(f"{path}: {name} is missing from an earlier {kind}-parallel rank.")

    def num_ranks(self, name: str) -> int:
        """Over how many ranks a canonical tensor is cut, or copied."""
        return self.experts.tp_size if expert_number(name) is None else self.experts.etp_size

    def read_into(self, out: torch.Tensor, name: str, region: Region) -> None:
        """Fill ``out`` with ``region`` of one rank's tensor."""
        rank, _, canonical = name.partition(":")
        entry, file = self._found[canonical][int(rank)]
        if isinstance(entry, Transposed):
            stored = torch.empty([stop - start for start, stop in region[::-1]], dtype=entry.dtype)
            file.read_into(stored, entry.stored, region[::-1])
            out.copy_(stored.t())
        else:
            file.read_into(out, entry, region)

    def path(self, rank: int, name: str) -> Path:
        """The file that holds a rank's shard of a canonical tensor."""
        return self._found[name][rank][1].path

    def _add(self, tp_rank: int, ep_rank: int, ranks: RankFiles, select: Select) -> None:
        stages = ranks.stages(tp_rank, ep_rank)
        by_stage = [[select(chunk, stage.path) for chunk in chunks(stage)] for stage in stages]
        offset = 0
        is_first = (tp_rank, ep_rank) == ranks.columns[0]
        added: set[str] = set()
        for chunk_number in range(max(map(len, by_stage))):
            for pp_rank, (file, stage) in enumerate(zip(stages, by_stage, strict=True)):
                if chunk_number < len(stage):
                    first = offset
                    offset += self._add_chunk((tp_rank, ep_rank), file, stage[chunk_number], first, added)
                    if is_first:
                        self.stages[pp_rank].append(tuple(range(first, offset)))
        if offset != self._shape.num_layers:
            raise Refused(
                f"{ranks.folder}: holds {offset} layers, its args or config.json mean {self._shape.num_layers}."
            )

    def _add_chunk(
        self,
        column: tuple[int, int],
        file: PtFile,
        chunk: Mapping[str, torch.Tensor],
        offset: int,
        added: set[str],
    ) -> int:
        """Add one chunk whose first layer is ``offset``; returns the number of its layers."""
        numbers = {number for name in chunk if (number := layer_number(name)) is not None}
        layers = {number: offset + place for place, number in enumerate(sorted(numbers))}
        etp_rank, block = self.experts.place(*column)
        for local_name, tensor in chunk.items():
            for in_chunk, entry in self._entries(local_name, tensor, file):
                name = with_expert(to_canonical(in_chunk, layers), block * self._num_local)
                if name in added and name not in VOCABULARY_TENSORS:
                    raise Refused(f"{file.path}: {name} is there twice.")
                added.add(name)
                rank = column[0] if expert_number(name) is None else etp_rank
                self._found[name].setdefault(rank, (entry, file))
        return len(layers)

    def _entries(
        self, local_name: str, tensor: torch.Tensor, file: PtFile
    ) -> Iterator[tuple[str, TensorEntry]]:
        entry = file.entry(local_name, tensor)
        if not is_grouped(local_name):
            yield from latent_entries(local_name, entry, self._shape)
            return
        if not self._num_local:
            raise Refused(
                f"{file.path}: {local_name} stacks experts, but args or config.json mean a dense model."
            )
        try:
            yield from unstacked(local_name, entry, self._num_local, self._shape.hidden_size)
        except ValueError as error:
            raise Refused(f"{file.path}: {local_name}: {error}.") from error


def _num_local(ranks: RankFiles, experts: ExpertRanks, num_experts: int) -> int:
    try:
        return experts.num_local(num_experts)
    except Refused as error:
        raise Refused(f"{ranks.folder}: {error}.") from error


def shard_segments(rule: TensorRule, shards: Sequence[TensorEntry]) -> list[Segment]:
    """Runs of the TP ranks' shards along the rule's axis, in the order of the whole tensor.

    Of a tensor that is not cut, the first rank's is the whole.
    """
    if rule.axis is None:
        return [Segment(0, 0, shards[0].shape[0])]
    width = shards[0].shape[rule.axis] // rule.blocks
    return [
        Segment(rank, block * width, (block + 1) * width)
        for block in range(rule.blocks)
        for rank in range(len(shards))
    ]
