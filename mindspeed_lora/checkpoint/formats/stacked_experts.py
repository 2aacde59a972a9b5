"""Hugging Face files under transformers' names in memory: all experts of a layer stacked in one tensor.

``mlp.experts.gate_up_proj`` ``[E, 2f, h]`` holds gate above up of every expert, ``mlp.experts.down_proj``
``[E, h, f]``. An expert's matrix is a run of whole rows of it, so it is read like a tensor of its own, by its bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mindspeed_lora.checkpoint.canonical import layer_tensors
from mindspeed_lora.checkpoint.storage.safetensors_file import SafetensorsFile, TensorEntry
from mindspeed_lora.checkpoint.storage.tensor_file import BinFile
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families.family import Family

WeightFile = SafetensorsFile | BinFile


@dataclass(frozen=True)
class _Other:
    """Another name of a canonical tensor, or of one tensor for all experts."""

    canonical: str
    pattern: re.Pattern[str]


def under_own_names(owner: dict[str, WeightFile], family: Family, shape: ModelShape) -> None:
    """Give the tensors of files that have other names than the family's their own, in ``owner`` and in the files.

    Raises:
        Refused: a stacked tensor has not the shape that the experts need.
    """
    others = [
        _Other(canonical, re.compile(re.escape(name).replace(r"\{layer\}", r"(\d+)")))
        for canonical, name in family.also_stored_as.items()
    ]
    for name in list(owner):
        for other in others:
            match = other.pattern.fullmatch(name)
            if match is not None and int(match.group(1)) < shape.num_layers:
                _rename(
                    owner,
                    name,
                    _parts(owner[name], name, other.canonical, int(match.group(1)), family, shape),
                )


def _rename(owner: dict[str, WeightFile], name: str, parts: Mapping[str, TensorEntry]) -> None:
    file = owner.pop(name)
    for part, entry in parts.items():
        if part in owner:
            raise Refused(f"{file.path}: tensor {name} is also there as {part}, in {owner[part].path.name}.")
        owner[part] = file
        file.entries[part] = entry


def _parts(
    file: WeightFile, name: str, canonical: str, layer: int, family: Family, shape: ModelShape
) -> dict[str, TensorEntry]:
    """The tensors under the family's names that one tensor holds, and where they lie."""
    row, stored = family.row(canonical), file.entries[name]
    if "{expert}" not in canonical:
        return {row.names(layer)[0]: stored}
    sizes = layer_tensors(shape, layer)
    first = canonical.format(layer=layer, expert=0)
    if shape.moe is None or first not in sizes:
        return {name: stored}
    one, count = row.hf_shapes(shape, sizes[first]), shape.moe.num_experts
    expected = (count, *sizes[first])
    if stored.shape != expected:
        raise Refused(
            f"{file.path}: tensor {name} has shape {list(stored.shape)}, but config.json means {list(expected)}."
        )
    entries: dict[str, TensorEntry] = {}
    offset = stored.offset
    for expert in range(count):
        for part, size in zip(row.of_expert(expert).names(layer), one, strict=True):
            entries[part] = TensorEntry(stored.dtype, size, offset)
            offset += entries[part].num_bytes
    return entries
