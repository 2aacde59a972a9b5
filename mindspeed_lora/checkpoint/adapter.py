"""Adapters by canonical name: read from PEFT folders for any layout, and written as PEFT folders.

A fused linear with one pair of factors has one A for all of its matrices: in PEFT's form the same ``lora_A`` under
q_proj, k_proj and v_proj (gate_proj and up_proj), and the matrices' rows of B.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch

from mindspeed_lora.adapters.spec import AdapterSpec, PartSpec
from mindspeed_lora.checkpoint.canonical import linear_shapes
from mindspeed_lora.checkpoint.peft import WEIGHTS_FILE, PeftAdapter, factor_name
from mindspeed_lora.checkpoint.peft_config import CONFIG_FILE, AdapterConfig
from mindspeed_lora.checkpoint.safetensors_writer import SafetensorsWriter, TensorSpec
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.models.families import FAMILIES
from mindspeed_lora.models.families.mapping import gather
from mindspeed_lora.models.families.segments import Range, Segment


class AdapterSource(PeftAdapter):
    """An adapter whose factors are read by canonical name."""

    def __init__(self, path: str | Path, shape: ModelShape, shared: Collection[str] | None = None) -> None:
        super().__init__(path, shape, shared)
        self._parts = {name: part for part in self.spec.parts for name in part.tensors}

    def read(self, name: str, axis: int | None = None, ranges: Sequence[Range] | None = None) -> torch.Tensor:
        """A factor ``[r, in]`` or ``[out, r]`` of a canonical name, or ranges of one axis of it."""
        part, factor = self._parts[name], name[-1]
        wanted: list[Sequence[Range]] = [((0, size),) for size in part.tensors[name]]
        if axis is not None and ranges is not None:
            wanted[axis] = ranges
        names = [factor_name(module, factor) for module in part.hf_modules]
        size = [sum(stop - start for start, stop in axis_ranges) for axis_ranges in wanted]
        out = torch.empty(size, dtype=self.file.entries[names[0]].dtype)
        gather(self.file, out, names, self._segments(part, factor), 0, wanted)
        return out

    def _segments(self, part: PartSpec, factor: str) -> list[Segment]:
        """Rows of the matrices' tensors in the order of the factor's rows."""
        if factor == "a" or len(part.hf_modules) == 1:
            return [Segment(0, 0, part.rank if factor == "a" else part.out_features)]
        mapping, _ = FAMILIES[self.shape.family].mapping(f"{part.module}.weight")
        return mapping.segments(self.shape, part.out_features)


def write_adapter(
    folder: Path,
    shape: ModelShape,
    config: AdapterConfig,
    spec: AdapterSpec,
    tensors: Mapping[str, torch.Tensor] | Callable[[str], torch.Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a PEFT folder from canonical factors, one at a time.

    ``tensors`` gives the whole factors of ``spec`` by canonical name. ``folder`` is made if need be; the caller
    sees to it that it is a temporary one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    get = tensors if callable(tensors) else tensors.__getitem__
    specs: dict[str, TensorSpec] = {}
    for part in spec.parts:
        for module, (rows, columns) in _hf_sizes(part, shape).items():
            specs[factor_name(module, "a")] = (dtype, (part.rank, columns))
            specs[factor_name(module, "b")] = (dtype, (rows, part.rank))
    with SafetensorsWriter(folder / WEIGHTS_FILE, specs) as writer:
        for part in spec.parts:
            lora_a, lora_b = (get(name).to(dtype) for name in part.tensors)
            for module, own in zip(part.hf_modules, _split(part, shape, lora_b), strict=True):
                writer.write(factor_name(module, "a"), lora_a)
                writer.write(factor_name(module, "b"), own)
    content = json.dumps(config.to_json(), indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(content + "\n", encoding="utf-8")


def _split(part: PartSpec, shape: ModelShape, lora_b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """B's rows by Hugging Face module."""
    if len(part.hf_modules) == 1:
        return (lora_b,)
    mapping, _ = FAMILIES[shape.family].mapping(f"{part.module}.weight")
    return mapping.split(shape, lora_b)


def _hf_sizes(part: PartSpec, shape: ModelShape) -> dict[str, tuple[int, int]]:
    """``(out, in)`` by Hugging Face module."""
    if len(part.hf_modules) == 1:
        return {part.hf_modules[0]: (part.out_features, part.in_features)}
    mapping, _ = FAMILIES[shape.family].mapping(f"{part.module}.weight")
    sizes = mapping.hf_shapes(shape, linear_shapes(shape)[part.linear])
    return {name: (size[0], size[1]) for name, size in zip(part.hf_modules, sizes, strict=True)}
