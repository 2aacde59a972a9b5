"""Reading Megatron checkpoints: ``iter_%07d/mp_rank_XX[_YYY]/model_optim_rng.pt``, one file a TP and PP rank.

The layout is found from the folders and checked against ``args``. Layers are numbered within a stage or,
with a virtual pipeline, within a chunk (``model0``, ``model1`` …); chunks are counted through in the order
of the forward pass, so that uneven stages need no flag. A number that no tensor has is a no-op layer.
"""

from __future__ import annotations

import dataclasses
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.checkpoint.canonical import (
    EMBEDDING,
    OUTPUT_LAYER,
    VOCABULARY_TENSORS,
    layer_number,
    tensor_rule,
    to_canonical,
    without_wrappers,
)
from mindspeed_lora.checkpoint.hf import WEIGHT_DTYPES, origin_of, shape_of
from mindspeed_lora.checkpoint.iteration import LATEST_FILE, latest_iteration
from mindspeed_lora.checkpoint.megatron_args import shape_from_args, with_untold
from mindspeed_lora.checkpoint.messages import first_few
from mindspeed_lora.checkpoint.model_files import kept_hf_config, kept_origin
from mindspeed_lora.checkpoint.pt_file import PtFile
from mindspeed_lora.checkpoint.safetensors_file import TensorEntry
from mindspeed_lora.checkpoint.source import CheckpointSource
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families.mapping import Region, gather
from mindspeed_lora.models.families.segments import Range, Segment

RANK_FILE = "model_optim_rng.pt"
_RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(_\d{3,})?")
_CHUNK = re.compile(r"model(\d*)")
_ADAPTER = re.compile(r".*lora_[ABab].*")
_SKIPPED = re.compile(rf".*\._extra_state\d*|.*rotary_pos_emb\.inv_freq|{_ADAPTER.pattern}")
"""Entries of a model that are no weights of the base: TE's state, rotary tables, unmerged adapters."""


def find_iteration(path: Path) -> Path | None:
    """The folder with the ``mp_rank_*`` folders that a path means, or None where there is none."""
    folder = latest_iteration(path) if (path / LATEST_FILE).is_file() else path
    if _rank_folders(folder):
        return folder
    iterations = sorted(path.glob("iter_*"))
    if len(iterations) == 1 and _rank_folders(iterations[0]):
        return iterations[0]
    return None


def _rank_folders(folder: Path) -> dict[tuple[int, int], Path]:
    """Rank folders by (TP rank, PP rank)."""
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = _RANK_FOLDER.fullmatch(path.name)
        if match is None:
            raise Refused(f"{path}: not a rank folder; expected mp_rank_XX or mp_rank_XX_YYY.")
        if match[3]:
            raise Refused(f"{path}: expert-parallel checkpoints are not supported.")
        found[int(match[1]), int(match[2] or 0)] = path
    return found


class McoreSource(CheckpointSource):
    """A Megatron checkpoint read by canonical names."""

    def __init__(self, path: Path, config_dir: Path | None = None) -> None:
        folder = find_iteration(path)
        if folder is None:
            raise Refused(f"{path}: no Megatron checkpoint; expected iter_%07d/mp_rank_XX/{RANK_FILE}.")
        self.folder = folder
        files, self.tp_size, self.pp_size = _open_ranks(folder)
        self._check_sizes(files)
        self._raw_names = [name for name, _ in _model_items(files[0, 0])]
        kept = kept_hf_config(folder)
        origin = kept_origin(kept) if kept else origin_of(config_dir) if config_dir else None
        config_dir = config_dir or kept
        shape = self._shape(files, config_dir)
        super().__init__(path, shape, origin, config_dir)
        self.shards = Shards(files, shape)
        self._check_tensors()
        stored = WEIGHT_DTYPES[self.dtype(EMBEDDING)]
        self.shape = dataclasses.replace(shape, params_dtype=stored)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a canonical tensor is stored in."""
        return self.shards.entries[name][0].dtype

    def _fill(self, out: torch.Tensor, name: str, wanted: Sequence[Sequence[Range]]) -> None:
        rule, shards = tensor_rule(name), self.shards.entries[name]
        axis = 0 if rule.axis is None else rule.axis
        parts = shards[:1] if rule.axis is None else shards
        width = parts[0].shape[axis] // rule.blocks
        segments = [
            Segment(rank, block * width, (block + 1) * width)
            for block in range(rule.blocks)
            for rank in range(len(parts))
        ]
        names = [f"{rank}:{name}" for rank in range(len(parts))]
        gather(self.shards, out, names, segments, axis, wanted)

    @property
    def has_unmerged_adapter(self) -> bool:
        """Whether the files also hold LoRA factors, which are not read here."""
        return any(_ADAPTER.fullmatch(name) for name in self._raw_names)

    def _check_sizes(self, files: dict[tuple[int, int], PtFile]) -> None:
        for file in files.values():
            args = file.content.get("args")
            for attribute, size in (
                ("tensor_model_parallel_size", self.tp_size),
                ("pipeline_model_parallel_size", self.pp_size),
            ):
                told = getattr(args, attribute, None)
                if told is not None and told != size:
                    raise Refused(
                        f"{file.path}: args.{attribute} is {told}, but the mp_rank_* folders of "
                        f"{self.folder} mean {size}; rank folders are missing or do not belong together."
                    )

    def _shape(self, files: dict[tuple[int, int], PtFile], config_dir: Path | None) -> ModelShape:
        """From ``args``, and from config.json if there is one: it tells the vocabulary without padding."""
        first = files[0, 0]
        config_shape = shape_of(config_dir) if config_dir else None
        args = first.content.get("args")
        if not isinstance(args, Namespace):
            if config_shape is None:
                raise Refused(
                    f"{first.path}: holds no args, and there is no hf_config; the shape is unknown."
                )
            return config_shape
        names = {
            without_wrappers(name) for file in files.values() for chunk in _chunks(file) for name in chunk
        }
        shape = shape_from_args(args, names, first.path)
        if config_shape is None or config_dir is None:
            return shape
        shape = with_untold(shape, args, config_shape)
        check_same_shape(shape, config_shape, f"args in {first.path}", f"{config_dir}/config.json")
        return dataclasses.replace(config_shape, hidden_dropout=shape.hidden_dropout)

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
        shards, rule = self.shards.entries[name], tensor_rule(name)
        if len(shards) != self.tp_size:
            raise Refused(
                f"{self.folder}: {name} is in {len(shards)} of {self.tp_size} tensor-parallel ranks."
            )
        whole = list(shards[0].shape)
        if rule.axis is not None and rule.axis < len(whole):
            whole[rule.axis] *= self.tp_size
        padded = name in VOCABULARY_TENSORS and whole[0] > full[0]
        if any(entry.shape != shards[0].shape for entry in shards) or (
            whole[1:] != list(full[1:]) or (whole[0] != full[0] and not padded)
        ):
            raise Refused(
                f"{self.folder}: {name} has shape {whole} over {self.tp_size} tensor-parallel ranks; "
                f"expected {list(full)}."
            )
        if any(entry.dtype not in WEIGHT_DTYPES or entry.dtype != shards[0].dtype for entry in shards):
            raise Refused(
                f"{self.folder}: {name} has dtype {shards[0].dtype}, or different ones over its ranks."
            )


class Shards:
    """All ranks' tensors as one store; its names are ``<tp rank>:<canonical name>``."""

    def __init__(self, files: dict[tuple[int, int], PtFile], shape: ModelShape) -> None:
        self.entries: dict[str, list[TensorEntry]] = {}
        """Canonical name → one entry per TP rank."""
        self._files: dict[str, PtFile] = {}
        """The files that ``entries`` are in, by the store's names."""
        for tp_rank in range(1 + max(tp for tp, _ in files)):
            ranks = [files[tp_rank, pp_rank] for pp_rank in range(1 + max(pp for _, pp in files))]
            self._add(tp_rank, ranks, shape)

    def read_into(self, out: torch.Tensor, name: str, region: Region) -> None:
        """Fill ``out`` with ``region`` of one rank's tensor."""
        tp_rank, _, canonical = name.partition(":")
        self._files[name].read_into(out, self.entries[canonical][int(tp_rank)], region)

    def _add(self, tp_rank: int, stages: Sequence[PtFile], shape: ModelShape) -> None:
        chunks = [_chunks(stage) for stage in stages]
        offset = 0
        for chunk_number in range(max(len(stage) for stage in chunks)):
            for file, stage in zip(stages, chunks, strict=True):
                if chunk_number < len(stage):
                    offset = self._add_chunk(tp_rank, file, stage[chunk_number], offset)
        if offset != shape.num_layers:
            raise Refused(
                f"{stages[0].path.parent.parent}: holds {offset} layers, its args or config.json mean "
                f"{shape.num_layers}."
            )

    def _add_chunk(self, tp_rank: int, file: PtFile, chunk: dict[str, Any], offset: int) -> int:
        """Add one chunk whose first layer is ``offset``; returns the first layer of the next chunk."""
        numbers = {number for name in chunk if (number := layer_number(name)) is not None}
        layers = {number: offset + place for place, number in enumerate(sorted(numbers))}
        for local_name, tensor in chunk.items():
            name = to_canonical(local_name, layers)
            store_name = f"{tp_rank}:{name}"
            if store_name in self._files:
                if name in VOCABULARY_TENSORS:
                    continue
                raise Refused(f"{file.path}: {name} is there twice.")
            entries = self.entries.setdefault(name, [])
            if len(entries) != tp_rank:
                raise Refused(f"{file.path}: {name} is missing from an earlier tensor-parallel rank.")
            entries.append(file.entry(local_name, tensor))
            self._files[store_name] = file
        return offset + len(layers)


def _open_ranks(folder: Path) -> tuple[dict[tuple[int, int], PtFile], int, int]:
    folders = _rank_folders(folder)
    tp_size, pp_size = 1 + max(tp for tp, _ in folders), 1 + max(pp for _, pp in folders)
    for tp_rank in range(tp_size):
        for pp_rank in range(pp_size):
            if (tp_rank, pp_rank) not in folders:
                raise Refused(
                    f"{folder}: the folder of tensor-parallel rank {tp_rank}, pipeline rank {pp_rank} is "
                    f"missing ({tp_size} × {pp_size} ranks)."
                )
    files = {rank: PtFile(path / RANK_FILE) for rank, path in folders.items()}
    for file in files.values():
        if not isinstance(file.content, dict) or not _chunks(file):
            raise Refused(f"{file.path}: holds no model.")
        version = file.content.get("checkpoint_version", 3.0)
        if isinstance(version, (int, float)) and version < 3.0:
            raise Refused(f"{file.path}: checkpoint_version {version} is not supported; expected 3.0.")
    return files, tp_size, pp_size


def _chunks(file: PtFile) -> list[dict[str, Any]]:
    """The weights of each virtual-pipeline chunk of a rank's file; one chunk without a virtual pipeline."""
    keys = [key for key in file.content if isinstance(key, str) and _CHUNK.fullmatch(key)]
    return [
        {
            name: value
            for name, value in file.content[key].items()
            if isinstance(value, torch.Tensor) and not _SKIPPED.fullmatch(name)
        }
        for key in sorted(keys, key=lambda key: int(key.removeprefix("model") or 0))
    ]


def _model_items(file: PtFile) -> Iterator[tuple[str, Any]]:
    """All entries of a rank's model, of every chunk."""
    for key, model in file.content.items():
        if isinstance(key, str) and _CHUNK.fullmatch(key) and isinstance(model, dict):
            yield from model.items()


_LENIENT = (
    "family",
    "vocab_size",
    "max_position_embeddings",
    "hidden_dropout",
    "attention_dropout",
    "params_dtype",
)


def check_same_shape(one: ModelShape, two: ModelShape, one_name: str, two_name: str) -> None:
    """Refuse two descriptions of one model that differ in what decides its tensors or what they compute.

    The first one's vocabulary may be larger, by its padding.
    """
    for field in dataclasses.fields(ModelShape):
        first, second = getattr(one, field.name), getattr(two, field.name)
        if field.name not in _LENIENT and first != second:
            raise Refused(f"{field.name} is {first} in {one_name}, but {second} in {two_name}.")
    if one.vocab_size < two.vocab_size:
        raise Refused(f"vocab_size is {one.vocab_size} in {one_name}, but {two.vocab_size} in {two_name}.")
