"""Reading Megatron checkpoints as canonical tensors, from the files of their TP and PP ranks.

Older orders of q, k and v are read as today's: a matrix from before ``checkpoint_version`` 2.0 has other runs of rows.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.checkpoint.canonical import (
    EMBEDDING,
    OUTPUT_LAYER,
    VOCABULARY_TENSORS,
    expert_number,
)
from mindspeed_lora.checkpoint.formats.hf import WEIGHT_DTYPES, origin_of, shape_of
from mindspeed_lora.checkpoint.formats.mcore_files import chunks, open_ranks
from mindspeed_lora.checkpoint.formats.mcore_latent import rule_in_files
from mindspeed_lora.checkpoint.formats.mcore_names import weights
from mindspeed_lora.checkpoint.formats.mcore_quantized import QuantizedShards
from mindspeed_lora.checkpoint.formats.mcore_shards import Shards, shard_segments
from mindspeed_lora.checkpoint.formats.megatron_args import shape_from_args, with_untold
from mindspeed_lora.checkpoint.formats.model_files import kept_hf_config, kept_origin
from mindspeed_lora.checkpoint.latest import Latest
from mindspeed_lora.checkpoint.messages import first_few
from mindspeed_lora.checkpoint.quantized.values import fill_values
from mindspeed_lora.checkpoint.source import CheckpointSource, StoredLayout, StoredPart
from mindspeed_lora.checkpoint.storage.manifest import manifest_folder
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES
from mindspeed_lora.models.families.mapping import gather
from mindspeed_lora.models.families.segments import Range, Segment
from mindspeed_lora.quantization.matrix import QuantizedMatrix


class McoreSource(CheckpointSource):
    """A Megatron checkpoint read by canonical names."""

    def __init__(self, path: Path, config_dir: Path | None = None, checking: bool = True) -> None:
        self.ranks = open_ranks(path, checking)
        self.folder, self.tp_size, self.pp_size = self.ranks.folder, self.ranks.tp_size, self.ranks.pp_size
        self.manifest_folder = manifest_folder(self.folder) if checking else None
        if self.ranks.has_adapter and not self.ranks.has_base:
            raise Refused(
                f"{path}: holds an adapter only; give it to --lora-load, beside its base model, or write it alone with "
                "convert_ckpt.py --save-lora-to-hf."
            )
        kept = kept_hf_config(self.folder)
        origin = kept_origin(kept) if kept else origin_of(config_dir) if config_dir else None
        config_dir = config_dir or kept
        shape = self._shape(config_dir)
        super().__init__(path, shape, origin, config_dir)
        self.shards = Shards(self.ranks, shape, weights)
        embedding = self.shards.entries.get(EMBEDDING)
        plain = torch.float32 if embedding is None else embedding[0].dtype
        self._quantized = QuantizedShards(self.shards, shape, self.tensors, plain)
        self.quantization = self._quantized.settings
        self._latest: Latest[list[QuantizedMatrix]] = Latest()
        self._qkv_version = self._checked_qkv_version()
        self._check_tensors()
        stored = WEIGHT_DTYPES[self.dtype(EMBEDDING)]
        self.shape = dataclasses.replace(shape, params_dtype=stored)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a canonical tensor is stored in."""
        return self.shards.entries[name][0].dtype

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored quantised."""
        return name in self._quantized

    def quantized(self, name: str) -> list[QuantizedMatrix] | None:
        """The whole quantised matrices of a linear's weight; None where it is plain."""
        return self._quantized.read(name) if name in self._quantized else None

    def _fill(self, out: torch.Tensor, name: str, wanted: Sequence[Sequence[Range]]) -> None:
        if name in self._quantized:
            matrices = self._latest.get(name, lambda: self._quantized.read(name))
            mapping, _ = FAMILIES[self.shape.family].mapping(name)
            fill_values(out, matrices, mapping.segments(self.shape, self.tensors[name][0]), wanted)
            return
        shards = self.shards.entries[name]
        rule = rule_in_files(name, shards, self.tensors[name])
        segments = shard_segments(rule, shards)
        if ".linear_qkv." in name and self._qkv_version < 2.0:
            segments = old_qkv_segments(self._qkv_version, self.shape, len(shards))
        axis = 0 if rule.axis is None else rule.axis
        names = [f"{rank}:{name}" for rank in range(len(shards))]
        gather(self.shards, out, names, segments, axis, wanted)

    def parts(self, name: str) -> list[StoredPart]:
        """Each TP rank's shard; of a tensor that is not cut, each rank's copy."""
        if name in self._quantized:
            return self._quantized.parts(name)
        return [
            StoredPart(name, self.shards.path(rank, name), entry.dtype, entry.shape)
            for rank, entry in enumerate(self.shards.entries[name])
        ]

    def layout(self) -> StoredLayout:
        """The layout that was found from the folders and their tensors, with the no-ops that ``args`` tells."""
        noops = getattr(self.ranks.first.content.get("args"), "noop_layers", None)
        places = noops.split(",") if isinstance(noops, str) else noops or ()
        return StoredLayout(
            self.tp_size,
            self.pp_size,
            tuple(map(tuple, self.shards.stages)),
            tuple(sorted(map(int, places))),
            self.shards.entries[EMBEDDING][0].shape[0] * self.tp_size,
            self.shards.experts.num_blocks,
            self.shards.experts.etp_size,
        )

    @property
    def has_unmerged_adapter(self) -> bool:
        """Whether the files also hold LoRA factors, which are not read here."""
        return self.ranks.has_adapter

    def _checked_qkv_version(self) -> float:
        """The version whose order of q, k and v the files have; grouped queries came after the old orders."""
        version, grouped = (
            self.ranks.qkv_version(),
            self.shape.num_query_groups != self.shape.num_attention_heads,
        )
        if not grouped or version >= 2.0:
            return version
        if self.ranks.first.content.get("checkpoint_version") is None:
            return 3.0
        raise Refused(
            f"{self.ranks.first.path}: checkpoint_version {version:g} has its own order of q, k and v, which is not "
            "defined for grouped queries; load and save it with Megatron-LM, which writes 3.0."
        )

    def _shape(self, config_dir: Path | None) -> ModelShape:
        names = {
            name
            for file in self.ranks.files.values()
            for chunk in chunks(file)
            for name in weights(chunk, file.path)
        }
        first = self.ranks.first
        return megatron_shape(first.content.get("args"), names, first.path, config_dir)

    def _check_tensors(self) -> None:
        """Compare the files' tensors with the architecture: names, shapes, dtypes."""
        missing = [name for name in self.tensors if name not in self.shards.entries]
        tied = not self.shape.untie_embeddings_and_output_weights
        extra = [
            name
            for name in self.shards.entries
            if name not in self.tensors and not (tied and name == OUTPUT_LAYER)
        ]
        for names, problem in ((missing, "missing"), (extra, "not known in a model of this shape")):
            if names:
                raise Refused(f"{self.folder}: tensors are {problem}: {first_few(names)}.")
        for name, full in self.tensors.items():
            self._check_shards(name, full)

    def _check_shards(self, name: str, full: tuple[int, ...]) -> None:
        shards = self.shards.entries[name]
        rule = rule_in_files(name, shards, full)
        count = self.shards.num_ranks(name)
        kind = "tensor-parallel" if expert_number(name) is None else "expert-tensor-parallel"
        if len(shards) != count:
            raise Refused(f"{self.folder}: {name} is in {len(shards)} of {count} {kind} ranks.")
        whole = list(shards[0].shape)
        if rule.axis is not None and rule.axis < len(whole):
            whole[rule.axis] *= count
        padded = name in VOCABULARY_TENSORS and whole[0] > full[0]
        if any(entry.shape != shards[0].shape for entry in shards) or (
            whole[1:] != list(full[1:]) or (whole[0] != full[0] and not padded)
        ):
            raise Refused(
                f"{self.folder}: {name} has shape {whole} over {count} {kind} ranks; expected {list(full)}."
            )
        if any(entry.dtype not in WEIGHT_DTYPES or entry.dtype != shards[0].dtype for entry in shards):
            raise Refused(
                f"{self.folder}: {name} has dtype {shards[0].dtype}, or different ones over its ranks."
            )


def old_qkv_segments(version: float, shape: ModelShape, tp_size: int) -> list[Segment]:
    """Rows of the ranks' ``linear_qkv`` as Megatron-LM ordered them before 2.0, in today's order.

    With n heads of width d on a rank: version 0 has ``[3, n, d]`` rows, version 1.0 ``[n, d, 3]``; today it is
    ``[n, 3, d]``.
    """
    heads, width = shape.num_attention_heads // tp_size, shape.kv_channels
    places = [(rank, head, kind) for rank in range(tp_size) for head in range(heads) for kind in range(3)]
    if version == 0:
        starts = [(rank, (kind * heads + head) * width) for rank, head, kind in places]
        return [Segment(rank, start, start + width) for rank, start in starts]
    rows = [(rank, (head * width + row) * 3 + kind) for rank, head, kind in places for row in range(width)]
    return [Segment(rank, row, row + 1) for rank, row in rows]


def megatron_shape(args: object, names: Collection[str], path: Path, config_dir: Path | None) -> ModelShape:
    """The shape from ``args`` of a file, and from config.json if there is one: it tells the vocabulary without padding.

    ``names`` are those of the parameters, without wrappers.
    """
    config_shape = shape_of(config_dir) if config_dir else None
    if not isinstance(args, Namespace):
        if config_shape is None:
            raise Refused(f"{path}: holds no args, and there is no hf_config; the shape is unknown.")
        return config_shape
    shape = shape_from_args(args, names, path)
    if config_shape is None or config_dir is None:
        return shape
    shape = with_untold(shape, args, config_shape)
    check_same_shape(shape, config_shape, f"args in {path}", f"{config_dir}/config.json")
    return dataclasses.replace(config_shape, hidden_dropout=shape.hidden_dropout)


_LENIENT = (
    "family",
    "vocab_size",
    "max_position_embeddings",
    "hidden_dropout",
    "attention_dropout",
    "params_dtype",
    "features",
)


def check_same_shape(one: ModelShape, two: ModelShape, one_name: str, two_name: str) -> None:
    """Refuse two descriptions of one model that differ in what decides its tensors or what they compute.

    The first one's vocabulary may be larger, by its padding.
    """
    for field in dataclasses.fields(ModelShape):
        first, second = getattr(one, field.name), getattr(two, field.name)
        if field.name not in _LENIENT and first != second:
            name, first, second = _difference(field.name, first, second)
            raise Refused(f"{name} is {first} in {one_name}, but {second} in {two_name}.")
    if one.vocab_size < two.vocab_size:
        raise Refused(f"vocab_size is {one.vocab_size} in {one_name}, but {two.vocab_size} in {two_name}.")


def _difference(name: str, first: Any, second: Any) -> tuple[str, Any, Any]:
    """The name and values that differ; of the experts and of latent attention the first such field."""
    if name not in ("moe", "mla"):
        return name, first, second
    shape = first or second
    size = "num_experts" if name == "moe" else "kv_lora_rank"
    for field in (size, *(field.name for field in dataclasses.fields(shape))):
        mine, theirs = (None if one is None else getattr(one, field) for one in (first, second))
        if mine != theirs:
            return field, mine, theirs
    return name, first, second
