"""What ``inspect`` tells of a model: its architecture, its weights by their headers, its layout and origin."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from mindspeed_lora.checkpoint.canonical import canonical_tensors
from mindspeed_lora.checkpoint.formats.hf import HfSource
from mindspeed_lora.checkpoint.formats.mcore import McoreSource
from mindspeed_lora.checkpoint.source import Origin, Source, StoredLayout
from mindspeed_lora.checkpoint.storage.tensor_writer import spec_bytes
from mindspeed_lora.config.shape import ModelShape

_SHAPE_KEYS = {
    "family": "family",
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_query_groups",
    "kv_channels": "kv_channels",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rotary_base": "rotary_base",
}
"""Key of the report → field of the shape."""

_OTHER_STATES = {
    "optimizer": "optimizer state",
    "opt_param_scheduler": "schedule",
    "rng_state": "random states",
}
"""Keys of a Megatron file beside its weights → what they are."""


def describe_shape(shape: ModelShape, origin: Origin | None) -> dict[str, Any]:
    """A model of which only the configuration is there: the same keys, without what weights would tell."""
    sizes = canonical_tensors(shape)
    return {
        "format": None,
        **{key: getattr(shape, field) for key, field in _SHAPE_KEYS.items()},
        "experts": None if shape.moe is None else dataclasses.asdict(shape.moe),
        "latent_attention": None if shape.mla is None else dataclasses.asdict(shape.mla),
        "tied_embeddings": not shape.untie_embeddings_and_output_weights,
        "padded_vocab_size": None,
        "parameters": sum(map(prod, sizes.values())),
        "quantization": None,
        "dtypes": {shape.params_dtype: sum(map(prod, sizes.values()))},
        "weight_bytes": None,
        "largest_tensor": None,
        "layout": None,
        "iteration": None,
        "origin": None if origin is None else dataclasses.asdict(origin),
        "config_dir": None,
        "holds": [],
    }


def describe_model(source: Source, folder: Path) -> dict[str, Any]:
    """A model with its weights.

    Keys: those of the shape by Megatron's names; ``experts`` and ``latent_attention`` (its parts, or none);
    ``parameters``, ``dtypes`` (parameters by dtype), ``weight_bytes`` of the unsharded tensors, ``largest_tensor``
    (``name``, ``bytes``); ``quantization`` (``type``, ``block_size``, ``double``, ``parameters``: how many are
    quantised, ``bits``: that each of them takes in the files), whose type stands among the dtypes; ``layout`` (``tp``,
    ``pp``, ``vpp``, ``ep``: blocks of experts, ``etp``: ranks that share an expert, ``stages``: the layers of each
    pipeline rank by virtual stage, ``noop_layers``: places of the no-ops);
    ``iteration``; ``origin`` (``path``, ``hub_id``, ``revision``); ``config_dir``; ``holds``: what lies there beside
    the weights.
    """
    specs = {name: (source.dtype(name), size) for name, size in canonical_tensors(source.shape).items()}
    dtypes: Counter[str] = Counter()
    quantized = {name: prod(size) for name, (_, size) in specs.items() if source.is_quantized(name)}
    sizes = {name: spec_bytes(spec) for name, spec in specs.items()}
    sizes.update({name: _stored_bytes(source, name) for name in quantized})
    for name, (dtype, size) in specs.items():
        kind = source.quantization.kind if source.quantization and name in quantized else str(dtype)
        dtypes[kind.removeprefix("torch.")] += prod(size)
    largest = max(sizes, key=lambda name: sizes[name])
    layout = source.layout()
    described = describe_shape(source.shape, source.origin)
    described.update(
        format=format_of(source),
        padded_vocab_size=None if layout is None else layout.padded_vocab_size,
        dtypes=dict(dtypes.most_common()),
        weight_bytes=sum(sizes.values()),
        largest_tensor={"name": largest, "bytes": sizes[largest]},
        quantization=_quantization(source, sum(quantized.values()), sum(sizes[name] for name in quantized)),
        layout=None if layout is None else _layout(layout),
        config_dir=None if source.config_dir is None else str(source.config_dir),
        iteration=_iteration(source),
        holds=_held(source),
    )
    return described


def _stored_bytes(source: Source, name: str) -> int:
    """Bytes of the tensors in files that a quantised weight is stored as."""
    return sum(spec_bytes((part.dtype, part.shape)) for part in source.parts(name))


def _quantization(source: Source, parameters: int, size: int) -> dict[str, Any] | None:
    settings = source.quantization
    if settings is None:
        return None
    return {
        "type": settings.kind,
        "block_size": None if settings.kind == "int8" else settings.block_size,
        "double": settings.double,
        "parameters": parameters,
        "bits": round(8 * size / parameters, 3),
    }


def format_of(source: Source) -> str:
    """``hf``, ``mg``, or ``torch_dist``."""
    return {HfSource: "hf", McoreSource: "mg"}.get(type(source), "torch_dist")


def model_tensors(source: Source, folder: Path) -> list[dict[str, Any]]:
    """Every canonical tensor with the tensors in files that it is made of."""
    return [
        {
            "name": name,
            "shape": list(size),
            "dtype": str(source.dtype(name)).removeprefix("torch."),
            "quantized": source.is_quantized(name),
            "bytes": _stored_bytes(source, name)
            if source.is_quantized(name)
            else spec_bytes((source.dtype(name), size)),
            "parts": [
                {"name": part.name, "file": _relative(part.path, folder), "shape": list(part.shape)}
                for part in source.parts(name)
            ],
        }
        for name, size in canonical_tensors(source.shape).items()
    ]


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _layout(layout: StoredLayout) -> dict[str, Any]:
    return {
        "tp": layout.tp_size,
        "pp": layout.pp_size,
        "vpp": layout.vp_size,
        "ep": layout.ep_size,
        "etp": layout.etp_size,
        "stages": [[list(chunk) for chunk in stage] for stage in layout.stages],
        "noop_layers": list(layout.noop_slots),
    }


def _iteration(source: Source) -> int | None:
    """The iteration that a Megatron checkpoint is of: as its files say, else as its folder is called."""
    number = source.ranks.first.content.get("iteration") if isinstance(source, McoreSource) else None
    if isinstance(number, int):
        return number
    named = re.fullmatch(r"iter_(\d+)", getattr(source, "folder", Path()).name)
    return int(named[1]) if named else None


def _held(source: Source) -> list[str]:
    """What a Megatron checkpoint holds beside its weights."""
    content = source.ranks.first.content if isinstance(source, McoreSource) else {}
    held = [what for key, what in _OTHER_STATES.items() if content.get(key)]
    return [*held, *(["LoRA factors"] if getattr(source, "has_unmerged_adapter", False) else [])]


def stage_texts(stages: Sequence[Sequence[Sequence[int]]]) -> list[str]:
    """The layers of each pipeline rank in words: ``0-2 and 6-7``."""
    return [" and ".join(map(_run_of, stage)) for stage in stages]


def _run_of(layers: Sequence[int]) -> str:
    if not layers:
        return "none"
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
