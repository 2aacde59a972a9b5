"""Adapters by canonical module: read from PEFT folders for any layout, and written as PEFT folders.

A fused linear trained as one matrix has one A for all of its parts: in PEFT's form the same ``lora_A`` under
q_proj, k_proj and v_proj (gate_proj and up_proj), and the parts' rows of B.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch

from mindspeed_lora.checkpoint.canonical import LINEARS, adapter_modules, linear_shapes
from mindspeed_lora.checkpoint.peft import WEIGHTS_FILE, PeftAdapter, factor_name
from mindspeed_lora.checkpoint.peft_config import CONFIG_FILE
from mindspeed_lora.checkpoint.safetensors_writer import SafetensorsWriter, TensorSpec
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES
from mindspeed_lora.models.families.mapping import gather
from mindspeed_lora.models.families.segments import Range, Segment


def open_adapter(path: str | Path, shape: ModelShape) -> AdapterSource:
    """Open the adapter that a path means: a PEFT folder, a ``--save`` folder or one of its iterations."""
    return AdapterSource(path, shape)


class AdapterSource(PeftAdapter):
    """An adapter by canonical module, for a model whose fused linears have one A each."""

    def __init__(self, path: str | Path, shape: ModelShape) -> None:
        super().__init__(path, shape)
        self.family = FAMILIES[shape.family]
        self._modules = self._covered()

    @property
    def r(self) -> int:
        """The rank."""
        return self.config.r

    @property
    def alpha(self) -> float:
        """LoRA's alpha."""
        return self.config.alpha

    @property
    def use_rslora(self) -> bool:
        """Whether the scaling is ``α / √r``."""
        return self.config.use_rslora

    @property
    def scaling(self) -> float:
        """The factor on ``B·A``."""
        return self.config.scaling

    @property
    def base_model_name(self) -> str | None:
        """``base_model_name_or_path`` of the adapter."""
        return self.config.base_model_name

    @cached_property
    def target_modules(self) -> tuple[str, ...]:
        """Megatron's names of the linears that carry the adapter."""
        found = {module.rpartition(".")[2] for module in self._modules}
        return tuple(name for name in LINEARS if name in found)

    def modules(self) -> list[str]:
        """Canonical names of the modules that carry the adapter."""
        return list(self._modules)

    def read(
        self, module: str, factor: str, axis: int | None = None, ranges: Sequence[Range] | None = None
    ) -> torch.Tensor:
        """Factor ``"a"`` ``[r, in]`` or ``"b"`` ``[out, r]`` of a canonical module, or ranges of one axis."""
        mapping, layer = self.family.mapping(f"{module}.weight")
        rows, columns = linear_shapes(self.shape)[module.rpartition(".")[2]]
        full = (self.r, columns) if factor == "a" else (rows, self.r)
        wanted: list[Sequence[Range]] = [((0, size),) for size in full]
        if axis is not None and ranges is not None:
            wanted[axis] = ranges
        names = [factor_name(name, factor) for name in mapping.modules(layer)]
        size = [sum(stop - start for start, stop in axis_ranges) for axis_ranges in wanted]
        out = torch.empty(size, dtype=self.file.entries[names[0]].dtype)
        if factor == "a":
            gather(self.file, out, names, [Segment(0, 0, self.r)], 0, wanted)
        else:
            gather(self.file, out, names, mapping.segments(self.shape, rows), 0, wanted)
        return out

    def _covered(self) -> list[str]:
        """Canonical modules that the adapter covers; whole fused matrices in every layer, or refused."""
        modules = []
        for module in adapter_modules(self.shape, tuple(LINEARS)):
            mapping, layer = self.family.mapping(f"{module}.weight")
            names = mapping.modules(layer)
            present = [name for name in names if name in self.hf_modules]
            if present and len(present) < len(names):
                raise Refused(
                    f"{self.config.path}: targets {present[0]} without {_first_missing(names, present)}; "
                    f"this version trains {', '.join(mapping.targets)} together: merge this adapter with "
                    "--save-model-type hf, or train a new one."
                )
            if present:
                self._check_shared(names)
                modules.append(module)
        linears = {module.rpartition(".")[2] for module in modules}
        if len(modules) != len(linears) * self.shape.num_layers:
            raise Refused(
                f"{self.config.path}: covers only some of the layers; this version trains every layer: "
                "merge this adapter with --save-model-type hf, or train a new one."
            )
        return modules

    def _check_shared(self, names: Sequence[str]) -> None:
        first = self.file.read(factor_name(names[0], "a"))
        for name in names[1:]:
            other = self.file.read(factor_name(name, "a"))
            if first.dtype != other.dtype or not torch.equal(
                first.view(torch.uint8), other.view(torch.uint8)
            ):
                raise Refused(
                    f"{self.file.path}: {names[0]} and {name} have different lora_A; this version trains one "
                    "A per fused matrix: merge this adapter with --save-model-type hf, or train a new one."
                )


def _first_missing(names: Sequence[str], present: Sequence[str]) -> str:
    return next(name for name in names if name not in present)


def write_adapter(
    folder: Path,
    shape: ModelShape,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    base_model_name: str | None,
    tensors: Mapping[str, torch.Tensor] | Callable[[str], torch.Tensor],
    dtype: torch.dtype = torch.float32,
    use_rslora: bool = False,
) -> None:
    """Write a PEFT folder from canonical factors, one at a time.

    ``tensors`` gives, by ``<module>.lora_a`` ``[r, in]`` and ``<module>.lora_b`` ``[out, r]``, the whole
    factors of every layer's ``target_modules`` (Megatron's names). ``folder`` is made if need be; the
    caller sees to it that it is a temporary one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    get = tensors if callable(tensors) else tensors.__getitem__
    modules = adapter_modules(shape, tuple(target_modules))
    specs: dict[str, TensorSpec] = {}
    for module in modules:
        for name, size in _peft_tensors(shape, module, r):
            specs[name] = (dtype, size)
    with SafetensorsWriter(folder / WEIGHTS_FILE, specs) as writer:
        for module in modules:
            mapping, layer = FAMILIES[shape.family].mapping(f"{module}.weight")
            names = mapping.modules(layer)
            lora_a = get(f"{module}.lora_a").to(dtype)
            parts = mapping.split(shape, get(f"{module}.lora_b").to(dtype))
            for name, part in zip(names, parts, strict=True):
                writer.write(factor_name(name, "a"), lora_a)
                writer.write(factor_name(name, "b"), part)
    config = peft_config(shape, r, alpha, dropout, target_modules, base_model_name, use_rslora)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def peft_config(
    shape: ModelShape,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    base_model_name: str | None,
    use_rslora: bool = False,
) -> dict[str, object]:
    """The ``adapter_config.json`` of an adapter on the linears of Megatron's names ``target_modules``."""
    family = FAMILIES[shape.family]
    targets = [
        target
        for linear, place in LINEARS.items()
        if linear in target_modules
        for target in family.mapping(f"decoder.layers.0.{place}.weight")[0].targets
    ]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": r,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _peft_tensors(shape: ModelShape, module: str, r: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """PEFT's names and shapes of the factors of one canonical module."""
    mapping, layer = FAMILIES[shape.family].mapping(f"{module}.weight")
    sizes = mapping.hf_shapes(shape, linear_shapes(shape)[module.rpartition(".")[2]])
    for name, (rows, columns) in zip(mapping.modules(layer), sizes, strict=True):
        yield factor_name(name, "a"), (r, columns)
        yield factor_name(name, "b"), (rows, r)
