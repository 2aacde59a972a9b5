"""Writing Hugging Face model folders: complete, with sharded weights through the family's table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.checkpoint.canonical import canonical_tensors
from mindspeed_lora.checkpoint.engine import Part, PlannedTensor, Shard, WritePlan
from mindspeed_lora.checkpoint.formats.hf import INDEX_FILE, WEIGHT_DTYPES, WEIGHTS_FILE, read_config
from mindspeed_lora.checkpoint.formats.hf_quantized_writer import (
    matrix_specs,
    plan_quantized,
    quantization_config,
)
from mindspeed_lora.checkpoint.formats.model_files import config_of, copy_model_files, write_json
from mindspeed_lora.checkpoint.source import Source
from mindspeed_lora.checkpoint.storage.safetensors_writer import SafetensorsLayout
from mindspeed_lora.checkpoint.storage.tensor_writer import TensorSpec, spec_bytes
from mindspeed_lora.models.families import family_for
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.segments import Range, pieces

MAX_SHARD_BYTES = 5 * 10**9
SLICE_BYTES = 4 << 20
SLICE_ROWS = 256
"""What is read at once: a multiple of so many rows, of about so many bytes."""


def plan_hf(source: Source, config_dir: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> WritePlan:
    """The files of a source as a Hugging Face folder; configuration and tokenizer files are those of ``config_dir``."""
    config = read_config(config_dir)
    family = family_for(config)
    shards = plan_shards(source, family, max_shard_bytes)
    files = shard_names(len(shards))
    full = canonical_tensors(source.shape)
    layouts = [
        SafetensorsLayout(
            {part: spec for name in shard for part, spec in _specs(source, family, name, full[name]).items()}
        )
        for shard in shards
    ]

    def finish(folder: Path) -> None:
        copy_model_files(config_dir, folder)
        write_json(folder / "config.json", config_of(_described(config, source, family), source.shape))
        if len(shards) > 1:
            _write_index(folder, files, [layout.specs for layout in layouts])

    planned = [
        Shard(
            {file: layout}, [one for name in shard for one in _plan_tensor(source, family, name, full[name])]
        )
        for file, layout, shard in zip(files, layouts, shards, strict=True)
    ]
    return WritePlan(planned, finish)


def _plan_tensor(source: Source, family: Family, name: str, size: tuple[int, ...]) -> Iterator[PlannedTensor]:
    """A tensor in slices of rows that stay in the processor's cache until they are written."""
    if source.is_quantized(name):
        yield plan_quantized(source, family, name)
        return
    row_bytes = prod(size[1:]) * source.dtype(name).itemsize
    step = max(1, SLICE_BYTES // row_bytes // SLICE_ROWS) * SLICE_ROWS
    for start in range(0, size[0], step):
        yield _plan_slice(source, family, name, size, (start, min(start + step, size[0])))


def _plan_slice(
    source: Source, family: Family, name: str, size: tuple[int, ...], rows: Range
) -> PlannedTensor:
    mapping, layer = family.mapping(name)
    names = mapping.names(layer)
    segments, row_size = mapping.segments(source.shape, size[0]), prod(size[1:])

    def parts(read: torch.Tensor) -> Iterator[Part]:
        for part, start, stop, at in pieces(segments, [rows]):
            yield Part(0, names[part], read[at : at + stop - start], start * row_size)

    return PlannedTensor(name, lambda: source.read(name, 0, [rows]), parts, rows)


def plan_shards(source: Source, family: Family, max_shard_bytes: int) -> list[list[str]]:
    """Canonical names by file; the parts of a canonical tensor stay together, so that it is read once."""
    shards: list[list[str]] = [[]]
    filled, full = 0, canonical_tensors(source.shape)
    for name in source.names():
        size = sum(map(spec_bytes, _specs(source, family, name, full[name]).values()))
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def shard_names(count: int) -> list[str]:
    """File names as transformers writes them."""
    if count == 1:
        return [WEIGHTS_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _specs(source: Source, family: Family, name: str, full: tuple[int, ...]) -> dict[str, TensorSpec]:
    """Hugging Face names, dtypes and shapes of what a canonical tensor of shape ``full`` becomes."""
    mapping, layer = family.mapping(name)
    dtype, settings = source.dtype(name), source.quantization
    specs: dict[str, TensorSpec] = {}
    for part, size in zip(mapping.names(layer), mapping.hf_shapes(source.shape, full), strict=True):
        if source.is_quantized(name):
            assert settings is not None
            specs.update(matrix_specs(part, settings, dtype, (size[0], size[1])))
        else:
            specs[part] = dtype, size
    return specs


def _write_index(target: Path, files: list[str], shards: list[Mapping[str, TensorSpec]]) -> None:
    weight_map = {name: file for file, specs in zip(files, shards, strict=True) for name in specs}
    total = sum(spec_bytes(spec) for specs in shards for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(target / INDEX_FILE, index)


def _described(config: dict[str, Any], source: Source, family: Family) -> dict[str, Any]:
    """The configuration with the dtype of the weights, under the key that it uses, and with how they are quantised."""
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    plain[key] = WEIGHT_DTYPES[source.dtype(source.names()[0])]
    if source.quantization is None:
        return plain
    return {**plain, "quantization_config": quantization_config(source, family)}
