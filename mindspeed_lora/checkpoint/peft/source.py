"""Adapters by canonical name: read from PEFT folders for any layout, and written as PEFT folders.

A fused linear with one pair of factors has one A for all of its matrices: in PEFT's form the same ``lora_A`` under
q_proj, k_proj and v_proj (gate_proj and up_proj), and the matrices' rows of B.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from mindspeed_lora.adapters.spec import AdapterSpec, PartSpec, TrainedTensor
from mindspeed_lora.checkpoint.canonical import canonical_tensors
from mindspeed_lora.checkpoint.peft.adapter_file import MOE_SHARED, WEIGHTS_FILE
from mindspeed_lora.checkpoint.peft.config import AdapterConfig, write_config
from mindspeed_lora.checkpoint.peft.description import hf_linears
from mindspeed_lora.checkpoint.peft.expert_names import FUSED
from mindspeed_lora.checkpoint.peft.folder import PeftAdapter
from mindspeed_lora.checkpoint.peft.fused_experts import ExpertFactors, expert_factors, joined
from mindspeed_lora.checkpoint.peft.trained_tensors import factor_name, model_shape
from mindspeed_lora.checkpoint.storage.safetensors_writer import SafetensorsWriter
from mindspeed_lora.checkpoint.storage.tensor_writer import TensorSpec
from mindspeed_lora.config.lora import LoraFlags
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.models.families import FAMILIES
from mindspeed_lora.models.families.mapping import gather
from mindspeed_lora.models.families.segments import Range, Segment


class AdapterSource(PeftAdapter):
    """An adapter whose tensors are read by canonical name."""

    def __init__(
        self,
        path: str | Path,
        shape: ModelShape,
        shared: Collection[str] | None = None,
        lora: LoraFlags | None = None,
    ) -> None:
        super().__init__(path, shape, shared, lora)
        self._parts = {name: part for part in self.spec.parts for name in part.tensors}
        self._rows = {rows.name: rows for rows in self.spec.token_rows}
        self._trained = {tensor.name: tensor for tensor in self.spec.trained}
        whole = {tensor.name: _first_names(tensor) for tensor in self.spec.trained if tensor.is_whole}
        self._whole = {**whole, **{tensor.name: [tensor.members[0]] for tensor in self.spec.kept}}

    def read(self, name: str, axis: int | None = None, ranges: Sequence[Range] | None = None) -> torch.Tensor:
        """A factor ``[r, in]`` or ``[out, r]`` of a canonical name, or ranges of one axis of it; or rows of tokens."""
        if name in self._rows:
            return self.file.read(self._rows[name].members[0])
        part, factor = self._parts[name], name[-1]
        wanted: list[Sequence[Range]] = [((0, size),) for size in part.tensors[name]]
        if axis is not None and ranges is not None:
            wanted[axis] = ranges
        names = [factor_name(self.stored_name(module), factor) for module in part.hf_modules]
        size = [sum(stop - start for start, stop in axis_ranges) for axis_ranges in wanted]
        out = torch.empty(size, dtype=self.file.entries[names[0]].dtype)
        gather(self.file, out, names, self._segments(part, factor), 0, wanted)
        return out

    def holds_whole(self, name: str) -> bool:
        """Whether the whole of a tensor of the base is in the adapter's file."""
        return name in self._whole

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that such a tensor is stored in."""
        return self.file.entries[self._whole[name][0]].dtype

    def fill(self, out: torch.Tensor, name: str, wanted: Sequence[Sequence[Range]]) -> None:
        """Fill ``out`` with the wanted ranges (per axis) of such a tensor."""
        rows = canonical_tensors(model_shape(self.config, self.shape))[name][0]
        gather(self.file, out, self._whole[name], self.mapping(name).segments(self.shape, rows), 0, wanted)

    def read_whole(self, name: str) -> torch.Tensor:
        """Such a tensor, whole."""
        size = canonical_tensors(model_shape(self.config, self.shape))[name]
        out = torch.empty(size, dtype=self.dtype(name))
        self.fill(out, name, [((0, extent),) for extent in size])
        return out

    def value(self, name: str) -> torch.Tensor:
        """Any tensor of the adapter by canonical name, whole; zeros for what of it is not the adapter's."""
        if self.holds_part(name):
            return self.overlay(torch.zeros(self._trained[name].size), name)
        return self.read_whole(name) if self.holds_whole(name) else self.read(name)

    def holds_part(self, name: str) -> bool:
        """Whether some of the Hugging Face tensors that a tensor of the base is made of are in the adapter's file."""
        return name in self._trained and name not in self._whole

    def overlay(self, whole: torch.Tensor, name: str) -> torch.Tensor:
        """Such a tensor, whole, with those parts as the adapter has them."""
        mapping = self.mapping(name)
        parts = [
            self.file.read(names[0]).to(part.dtype) if names else part
            for names, part in zip(self._trained[name].members, mapping.split(self.shape, whole), strict=True)
        ]
        return mapping.join(self.shape, parts)

    def _segments(self, part: PartSpec, factor: str) -> list[Segment]:
        """Rows of the matrices' tensors in the order of the factor's rows."""
        if factor == "a" or part.label:
            return [Segment(0, 0, part.rank if factor == "a" else part.out_features)]
        mapping, _ = FAMILIES[self.shape.family].mapping(part.weight)
        return mapping.segments(self.shape, part.out_features)


def write_adapter(
    folder: Path,
    shape: ModelShape,
    config: AdapterConfig,
    spec: AdapterSpec,
    tensors: Mapping[str, torch.Tensor] | Callable[[str], torch.Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a PEFT folder from canonical tensors, one at a time.

    ``tensors`` gives the whole factors and other tensors of ``spec`` by canonical name. ``folder`` is made if need
    be; the caller sees to it that it is a temporary one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    get = tensors if callable(tensors) else tensors.__getitem__
    fused, unfused = _by_form(config, shape, spec)
    metadata = {MOE_SHARED: "true"} if spec.moe_shared else None
    specs = adapter_specs(shape, config, spec, dtype)
    with SafetensorsWriter(folder / WEIGHTS_FILE, specs, metadata) as writer:
        for part in unfused:
            lora_a, lora_b = (get(name).to(dtype) for name in part.tensors)
            parts = _split(part, shape, lora_b)
            for number, module in enumerate(part.hf_modules):
                stored = config.stored_name(module)
                writer.write(factor_name(stored, "a"), lora_a)
                writer.write(factor_name(stored, "b"), parts[number % len(parts)])
        for factors, experts in fused:
            for name, value in zip(factors.sizes, joined(factors, _pairs(experts, get)), strict=True):
                writer.write(name, value.to(dtype))
        for tensor in spec.trained:
            # Without the rows that pad the vocabulary.
            whole = get(tensor.name)[: tensor.size[0]].to(dtype)
            mapping, _ = FAMILIES[shape.family].mapping(tensor.name)
            for names, own in zip(tensor.members, mapping.split(shape, whole), strict=True):
                for name in names:
                    writer.write(name, own)
        others = [(rows.name, rows.members) for rows in spec.token_rows]
        for name, members in [*others, *((kept.name, kept.members) for kept in spec.kept)]:
            for member in members:
                writer.write(member, get(name).to(dtype))
    write_config(folder, config.to_json())


def adapter_specs(
    shape: ModelShape, config: AdapterConfig, spec: AdapterSpec, dtype: torch.dtype
) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor of the file."""
    specs: dict[str, TensorSpec] = {}
    fused, unfused = _by_form(config, shape, spec)
    for part in unfused:
        for module, (rows, columns) in _hf_sizes(part, shape).items():
            stored = config.stored_name(module)
            specs[factor_name(stored, "a")] = (dtype, (part.rank, columns))
            specs[factor_name(stored, "b")] = (dtype, (rows, part.rank))
    for factors, _ in fused:
        specs.update({name: (dtype, size) for name, size in factors.sizes.items()})
    for tensor in spec.trained:
        mapping, _ = FAMILIES[shape.family].mapping(tensor.name)
        for names, size in zip(tensor.members, mapping.hf_shapes(shape, tensor.size), strict=True):
            specs.update(dict.fromkeys(names, (dtype, size)))
    for single in spec.token_rows:
        specs.update(dict.fromkeys(single.members, (dtype, (len(single.tokens), single.width))))
    for kept in spec.kept:
        specs.update(dict.fromkeys(kept.members, (dtype, (shape.vocab_size, shape.hidden_size))))
    return specs


def _first_names(tensor: TrainedTensor) -> list[str]:
    """One name in the adapter's file for each Hugging Face tensor of a trained one."""
    return [names[0] for names in tensor.members if names]


Experts = Sequence[Sequence[PartSpec]]
"""For each expert of a layer the parts of one of its linears."""


def _by_form(
    config: AdapterConfig, shape: ModelShape, spec: AdapterSpec
) -> tuple[list[tuple[ExpertFactors, Experts]], list[PartSpec]]:
    """The factors of whole 3-D parameters with the parts that are in them, and the parts that are not."""
    if shape.moe is None or config.moe_format != FUSED:
        return [], list(spec.parts)
    owners = {name: part for part in spec.parts for name in part.hf_modules}
    fused: list[tuple[ExpertFactors, Experts]] = []
    for factors in expert_factors(config, hf_linears(shape), shape):
        experts = [list(dict.fromkeys(owners[name] for name in names)) for names in factors.experts]
        fused.append((factors, experts))
    inside = {name for factors, _ in fused for names in factors.experts for name in names}
    return fused, [part for part in spec.parts if part.hf_modules[0] not in inside]


def _pairs(
    experts: Experts, get: Callable[[str], torch.Tensor]
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Of each expert its parts' factors; those of a part that is the last expert's too are not read again."""
    last: Sequence[PartSpec] = ()
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for parts in experts:
        if parts != last:
            last, pairs = parts, []
            for part in parts:
                lora_a, lora_b = (get(name) for name in part.tensors)
                pairs.append((lora_a, lora_b))
        yield pairs


def _split(part: PartSpec, shape: ModelShape, lora_b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """B's rows by Hugging Face module; of a part that all experts share, by the first one's."""
    if part.label:
        return (lora_b,)
    mapping, _ = FAMILIES[shape.family].mapping(part.weight)
    return mapping.split(shape, lora_b)


def _hf_sizes(part: PartSpec, shape: ModelShape) -> dict[str, tuple[int, int]]:
    """``(out, in)`` by Hugging Face module."""
    size = (part.out_features, part.in_features)
    if part.label:
        return dict.fromkeys(part.hf_modules, size)
    mapping, _ = FAMILIES[shape.family].mapping(part.weight)
    sizes = mapping.hf_shapes(shape, size)
    return {name: (sizes[number % len(sizes)][0], size[1]) for number, name in enumerate(part.hf_modules)}
