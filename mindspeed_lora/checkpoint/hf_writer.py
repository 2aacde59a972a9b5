"""Writing Hugging Face model folders: complete, with sharded weights streamed through the family's table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.checkpoint.canonical import canonical_tensors
from mindspeed_lora.checkpoint.hf import INDEX_FILE, WEIGHT_DTYPES, WEIGHTS_FILE, read_config
from mindspeed_lora.checkpoint.model_files import config_of, copy_model_files, write_json
from mindspeed_lora.checkpoint.safetensors_writer import SafetensorsWriter, TensorSpec, spec_bytes
from mindspeed_lora.checkpoint.source import Source
from mindspeed_lora.models.families import family_for
from mindspeed_lora.models.families.family import Family

MAX_SHARD_BYTES = 5 * 10**9


def write_hf(
    source: Source,
    config_dir: Path,
    target: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    observe: Callable[[str, torch.Tensor], None] | None = None,
) -> None:
    """Write a source as a Hugging Face folder, with configuration and tokenizer files from ``config_dir``.

    ``observe`` sees each canonical tensor as it is read. The caller makes ``target`` a temporary folder.
    """
    copy_model_files(config_dir, target)
    config = read_config(config_dir)
    write_json(target / "config.json", config_of(_with_dtype(config, source), source.shape))
    family = family_for(config)
    shards = plan_shards(source, family, max_shard_bytes)
    files = shard_names(len(shards))
    for file, shard in zip(files, shards, strict=True):
        _write_shard(source, family, target / file, shard, observe)
    if len(shards) > 1:
        _write_index(target, files, [_specs(source, family, shard) for shard in shards])


def plan_shards(source: Source, family: Family, max_shard_bytes: int) -> list[list[str]]:
    """Canonical names by file; the parts of a canonical tensor stay together, so that it is read once."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in source.names():
        size = sum(spec_bytes(spec) for spec in _specs(source, family, [name]).values())
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


def _specs(source: Source, family: Family, names: list[str]) -> dict[str, TensorSpec]:
    """Hugging Face names, dtypes and shapes of some canonical tensors."""
    full = canonical_tensors(source.shape)
    specs: dict[str, TensorSpec] = {}
    for name in names:
        mapping, layer = family.mapping(name)
        sizes = mapping.hf_shapes(source.shape, full[name])
        specs.update(
            {part: (source.dtype(name), size) for part, size in zip(mapping.names(layer), sizes, strict=True)}
        )
    return specs


def _write_shard(
    source: Source,
    family: Family,
    path: Path,
    names: list[str],
    observe: Callable[[str, torch.Tensor], None] | None,
) -> None:
    with SafetensorsWriter(path, _specs(source, family, names)) as writer:
        for name in names:
            tensor = source.read(name)
            if observe is not None:
                observe(name, tensor)
            mapping, layer = family.mapping(name)
            for hf_name, part in zip(mapping.names(layer), mapping.split(source.shape, tensor), strict=True):
                writer.write(hf_name, part)


def _write_index(target: Path, files: list[str], shards: list[dict[str, TensorSpec]]) -> None:
    weight_map = {name: file for file, specs in zip(files, shards, strict=True) for name in specs}
    total = sum(spec_bytes(spec) for specs in shards for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(target / INDEX_FILE, index)


def _with_dtype(config: dict[str, Any], source: Source) -> dict[str, Any]:
    """The configuration with the dtype of the weights, under the key that it uses."""
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return {**config, key: WEIGHT_DTYPES[source.dtype(source.names()[0])]}
