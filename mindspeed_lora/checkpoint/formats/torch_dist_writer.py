"""Writing megatron-core's distributed checkpoints (``torch_dist``): one file a rank, its shards as chunks.

Layers are stacked under one key, and so are the experts of a layer; a rank's part of a layer's or expert's matrix is
one chunk, of ``linear_fc1`` two (gate and up), as megatron-core itself would save a model of this layout. What no rank
holds alone is in the file of TP rank 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from mindspeed_lora.checkpoint.canonical import (
    OUTPUT_LAYER,
    VOCABULARY_TENSORS,
    expert_number,
    layer_linears,
    shard_ranges,
    tensor_rule,
)
from mindspeed_lora.checkpoint.engine import Part, PlannedTensor, Shard, WritePlan
from mindspeed_lora.checkpoint.formats.iteration import iteration_folder
from mindspeed_lora.checkpoint.formats.mcore_experts import ExpertRanks
from mindspeed_lora.checkpoint.formats.mcore_writer import (
    CHECKPOINT_VERSION,
    chunk_tensors,
    finish_folder,
    read_padded,
)
from mindspeed_lora.checkpoint.formats.megatron_args import args_from_shape
from mindspeed_lora.checkpoint.formats.torch_dist import BACKEND, BACKEND_FILE, COMMON_FILE
from mindspeed_lora.checkpoint.formats.torch_dist_names import Naming
from mindspeed_lora.checkpoint.source import Source
from mindspeed_lora.checkpoint.storage.distcp_writer import (
    ChunkPlan,
    DistcpLayout,
    stored_tensors,
    write_metadata,
)
from mindspeed_lora.config.stages import LayerPlacement

_Cut = tuple[int, ChunkPlan, tuple[int, int, int]]
"""File of a stage, chunk, and (axis, first, count) of the chunk within the canonical tensor."""


class _Planner:
    """The chunks of a source at one layout."""

    def __init__(
        self, source: Source, placement: LayerPlacement, padded: int, experts: ExpertRanks, naming: Naming
    ) -> None:
        self.source = source
        self.placement = placement
        self.padded = padded
        self.experts = experts
        self.naming = naming
        moe = source.shape.moe
        self.num_experts = 0 if moe is None else moe.num_experts
        self.num_files = max(experts.tp_size, experts.etp_size * experts.num_blocks)
        """Files of a stage, as many as its ranks at least are."""
        self.sizes: dict[str, tuple[int, ...]] = {}
        """Full size of each stored tensor, by key."""
        self.files: dict[str, DistcpLayout] = {}
        """By name in the iteration's folder."""

    def stage(self, pp_rank: int) -> Shard:
        """The files of one pipeline rank."""
        chunks: list[list[ChunkPlan]] = [[] for _ in range(self.num_files)]
        tensors = []
        for name, full in self._tensors(pp_rank):
            cuts = list(self._cuts(name, full))
            for rank, chunk, _ in cuts:
                chunks[rank].append(chunk)
            tensors.append(self._planned(name, cuts))
        objects = list(self._objects(pp_rank))
        files = {
            f"__{pp_rank * self.num_files + rank}_0.distcp": DistcpLayout(
                [] if rank else objects, chunks[rank]
            )
            for rank in range(self.num_files)
        }
        self.files.update(files)
        folder = iteration_folder(Path(), 1)
        return Shard({(folder / file).as_posix(): layout for file, layout in files.items()}, tensors)

    def _tensors(self, pp_rank: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Canonical name and full shape, with the padded vocabulary, of what a pipeline rank holds."""
        for chunk in self.placement.rank_chunks(pp_rank):
            for local_name, name, full in chunk_tensors(self.source.shape, chunk):
                if local_name == OUTPUT_LAYER and name != OUTPUT_LAYER:
                    continue  # the copy of tied embeddings is stored once
                yield name, (self.padded, *full[1:]) if name in VOCABULARY_TENSORS else full

    def _objects(self, pp_rank: int) -> Iterator[str]:
        """Keys of the states that a model asks of its linears, here None: of Transformer Engine or megatron-core."""
        for chunk in self.placement.rank_chunks(pp_rank):
            for layer in chunk.layers:
                prefix, front = self.naming.layer(layer)
                places = [
                    f"decoder.layers.{layer}.{place}" for place in layer_linears(self.source.shape, layer)
                ]
                keys = [self.naming.key(f"{place}.weight") for place in places]
                keys.append((f"{prefix}self_attention.core_attention.weight", front))
                for key, at in keys:
                    whole = self._stacked(key)
                    numbers = ".".join(map(str, at or (0,))), ".".join(map(str, whole or (1,)))
                    yield f"{key.removesuffix('.weight')}._extra_state/shard_{'_'.join(numbers)}"

    def _stacked(self, key: str) -> tuple[int, ...]:
        """Sizes of the axes before a layer's tensor's own."""
        layers = (self.placement.num_slots,) if self.naming.is_stacked else ()
        return (*layers, self.num_experts) if ".experts.experts." in key else layers

    def _cuts(self, name: str, full: tuple[int, ...]) -> Iterator[_Cut]:
        key, front = self.naming.key(name)
        self.sizes[key] = (*self._stacked(key), *full) if key.startswith("decoder.layers.") else full
        rule, dtype = tensor_rule(name), self.source.dtype(name)
        axis, first, count = rule.axis or 0, 0, self.experts.tp_size
        number = expert_number(name)
        if number is not None:
            count = self.experts.etp_size
            first = number // self.experts.num_local(self.num_experts) * count
        for rank in range(1 if rule.axis is None else count):
            for start, stop in shard_ranges(rule, full[axis], rank, count):
                offsets, sizes = [0] * len(full), list(full)
                offsets[axis], sizes[axis] = start, stop - start
                shape = (*(1 for _ in front), *sizes)
                chunk = ChunkPlan(key, (*front, *offsets), (dtype, shape))
                yield first + rank, chunk, (axis, start, stop - start)

    def _planned(self, name: str, cuts: list[_Cut]) -> PlannedTensor:
        def parts(whole: torch.Tensor) -> Iterator[Part]:
            for rank, chunk, cut in cuts:
                yield Part(rank, chunk.name, whole.narrow(*cut).reshape(chunk.spec[1]))

        return PlannedTensor(name, lambda: read_padded(self.source, name, self.padded), parts)


def plan_torch_dist(
    source: Source,
    placement: LayerPlacement,
    tp_size: int,
    padded_vocab_size: int,
    transformer_engine: bool = False,
    experts: ExpertRanks | None = None,
) -> WritePlan:
    """The files of a source as a distributed checkpoint of one iteration, numbered 1; a shard is a pipeline rank.

    ``transformer_engine`` names the norms of layers with experts, or with latent attention, as its layers do.
    """
    experts = experts or ExpertRanks(tp_size=tp_size, etp_size=tp_size)
    slots = [layer for chunk in placement.chunks for layer in chunk]
    slot_of = {layer: slot for slot, layer in enumerate(slots) if layer is not None}
    naming = Naming(source.shape, slot_of, transformer_engine)
    planner = _Planner(source, placement, padded_vocab_size, experts, naming)
    shards = [planner.stage(pp_rank) for pp_rank in range(placement.pp_size)]
    args = args_from_shape(source.shape, tp_size, placement, padded_vocab_size, experts=experts)
    if transformer_engine:
        args.transformer_impl = "transformer_engine"

    def finish(folder: Path) -> None:
        iteration = iteration_folder(folder, 1)
        common = {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": 1}
        torch.save(common, iteration / COMMON_FILE)
        write_metadata(iteration, stored_tensors(planner.sizes, planner.files), _objects(planner.files))
        backend = {
            "sharded_backend": BACKEND,
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        (iteration / BACKEND_FILE).write_text(json.dumps(backend), encoding="utf-8")
        finish_folder(source, folder)

    return WritePlan(shards, finish)


def _objects(files: Mapping[str, DistcpLayout]) -> dict[str, tuple[str, int, int]]:
    """File, first byte and length of each object, by key."""
    return {
        key: (file, *place) for file, layout in files.items() for key, place in layout.object_places.items()
    }
