"""Writing quantised weights into Hugging Face folders, as transformers with bitsandbytes saves and loads them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch

from mindspeed_lora.checkpoint.canonical import VOCABULARY_TENSORS, canonical_tensors
from mindspeed_lora.checkpoint.engine import Part, PlannedTensor
from mindspeed_lora.checkpoint.formats.hf_quantized import SCB, WEIGHT_FORMAT
from mindspeed_lora.checkpoint.quantized.state import (
    ABSMAX,
    NESTED_ABSMAX,
    STATE,
    State,
    code_tables,
    four_bit_specs,
    num_blocks,
    num_nested,
    state_bytes,
    state_tensor,
)
from mindspeed_lora.checkpoint.source import Source
from mindspeed_lora.checkpoint.storage.tensor_writer import TensorSpec
from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.quantization.matrix import QuantizedMatrix

_LAYER = re.compile(r"(.*\.layers\.)(\d+)\.(.+)")
_EXPERT = re.compile(r"(.+\.experts)\.\d+\..+")


def matrix_specs(
    name: str, settings: QuantSettings, dtype: torch.dtype, shape: tuple[int, int]
) -> dict[str, TensorSpec]:
    """Name, dtype and shape of the tensors that a quantised matrix ``[out, in]`` is stored as."""
    if settings.kind == "int8":
        specs = {"": (torch.int8, shape), SCB: (torch.float32, shape[:1]), WEIGHT_FORMAT: (torch.uint8, ())}
        return {_name(name, part): (kind, tuple(size)) for part, (kind, size) in specs.items()}
    four = four_bit_specs(
        settings,
        prod(shape),
        num_blocks(shape, settings),
        num_nested(shape, settings),
        state_bytes(settings, dtype, shape),
    )
    return {_name(name, part): spec for part, spec in four.items()}


def matrix_tensors(matrix: QuantizedMatrix) -> dict[str, torch.Tensor]:
    """The tensors that a quantised matrix is stored as, by what they are."""
    settings = matrix.settings
    if settings.kind == "int8":
        return {"": matrix.packed, SCB: matrix.absmax, WEIGHT_FORMAT: torch.zeros((), dtype=torch.uint8)}
    tensors = {"": matrix.packed, ABSMAX: matrix.absmax, **code_tables(settings)}
    offsets: tuple[float, ...] = ()
    if matrix.nested is not None:
        tensors[NESTED_ABSMAX] = matrix.nested.absmax
        offsets = (float(matrix.nested.offset),)
    state = State(settings, matrix.dtype, matrix.shape, offsets)
    return {**tensors, f"{STATE}{settings.kind}": state_tensor(state)}


def plan_quantized(source: Source, family: Family, name: str) -> PlannedTensor:
    """A linear's weight, its Hugging Face matrices quantised one by one."""
    mapping, layer = family.mapping(name)
    names = mapping.names(layer)

    def parts(matrices: Any) -> Iterator[Part]:
        for hf_name, matrix in zip(names, matrices, strict=True):
            for part, tensor in matrix_tensors(matrix).items():
                yield Part(0, _name(hf_name, part), tensor)

    return PlannedTensor(name, lambda: source.quantized(name) or [], parts)


def _name(weight: str, part: str) -> str:
    """The name of a tensor beside a weight."""
    return f"{weight.removesuffix('weight')}{part}" if part in (SCB, WEIGHT_FORMAT) else f"{weight}{part}"


def quantization_config(source: Source, family: Family) -> dict[str, Any]:
    """What config.json says of a source's quantised weights: transformers' ``BitsAndBytesConfig``."""
    settings = source.quantization
    assert settings is not None
    four = settings.kind != "int8"
    dtype = str(source.dtype(source.names()[0])).removeprefix("torch.")
    return {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": settings.kind if four else "fp4",
        "bnb_4bit_use_double_quant": settings.double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": _plain_modules(source, family),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": "bitsandbytes",
    }


def _plain_modules(source: Source, family: Family) -> list[str]:
    """The modules that are not quantised, as ``llm_int8_skip_modules`` names them: one kind of all layers by its end.

    The output layer is always among them; a layer's experts are named together.
    """
    plain: dict[str, list[str]] = {}
    kinds: dict[str, int] = {}
    for name, size in canonical_tensors(source.shape).items():
        if name in VOCABULARY_TENSORS or len(size) != 2:
            continue
        for module in _modules(family, name):
            match = _LAYER.fullmatch(module)
            kind = match[3] if match else module
            kinds[kind] = kinds.get(kind, 0) + 1
            if not source.is_quantized(name):
                plain.setdefault(kind, []).append(module)
    named = {"lm_head": None}
    for kind, modules in plain.items():
        is_kind = len(modules) == kinds[kind] and not kind.endswith("experts")
        named.update(dict.fromkeys([kind] if is_kind else modules))
    return list(named)


def _modules(family: Family, name: str) -> Sequence[str]:
    mapping, layer = family.mapping(name)
    return [match[1] if (match := _EXPERT.fullmatch(one)) else one for one in mapping.modules(layer)]
