"""Which tensors of the base an adapter trains: ``modules_to_save`` and ``bias`` of its configuration, on one model.

Embedding and output layer that are tied in the base come apart when one of them is trained, as in PEFT: both keep
their own values from then on, and what is not trained stays at the base. ``ensure_weight_tying`` keeps them one.
"""

from __future__ import annotations

import dataclasses

from mindspeed_lora.adapters.spec import TrainedTensor
from mindspeed_lora.checkpoint.canonical import VOCABULARY_TENSORS, canonical_tensors
from mindspeed_lora.checkpoint.peft.config import AdapterConfig
from mindspeed_lora.checkpoint.peft.expert_names import is_expert
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES

PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's modules."""


def factor_name(module: str, factor: str) -> str:
    """Name in ``adapter_model.safetensors`` of factor ``"a"`` or ``"b"`` of a Hugging Face module."""
    return f"{PREFIX}{module}.lora_{factor.upper()}.weight"


def unties(config: AdapterConfig, shape: ModelShape) -> bool:
    """Whether the adapter makes a tied output layer a tensor of its own."""
    if shape.untie_embeddings_and_output_weights or config.ensure_weight_tying:
        return False
    return any(config.saves(module) for module in vocabulary_modules(shape))


def model_shape(config: AdapterConfig, shape: ModelShape) -> ModelShape:
    """The shape of the model with the adapter on it."""
    if unties(config, shape):
        return dataclasses.replace(shape, untie_embeddings_and_output_weights=True)
    return shape


def trained_tensors(config: AdapterConfig, shape: ModelShape) -> tuple[TrainedTensor, ...]:
    """The tensors that the adapter trains, of a model of this shape without it.

    Raises:
        Refused: part of a fused matrix is to be trained whole, or a module both whole and by factors.
    """
    family, found = FAMILIES[shape.family], []
    if not config.modules_to_save and config.bias == "none":
        return ()
    for name, size in canonical_tensors(model_shape(config, shape)).items():
        mapping, layer = family.mapping(name)
        members = tuple(_adapter_names(config, shape, hf_name) for hf_name in mapping.names(layer))
        if any(members):
            tensor = TrainedTensor(name=name, size=size, members=members)
            if not tensor.is_whole and not name.endswith(".bias"):
                _refuse_part(config, mapping.names(layer), members)
            found.append(tensor)
    return tuple(found)


def vocabulary_modules(shape: ModelShape) -> list[str]:
    """Full Hugging Face names of embedding and output layer."""
    family = FAMILIES[shape.family]
    return [family.mapping(name)[0].modules(None)[0] for name in VOCABULARY_TENSORS]


def _adapter_names(config: AdapterConfig, shape: ModelShape, hf_name: str) -> tuple[str, ...]:
    """Names of a Hugging Face tensor in the adapter's file; none where it is frozen."""
    module, _, kind = hf_name.rpartition(".")
    tied = not shape.untie_embeddings_and_output_weights and not unties(config, shape)
    embedding, output = vocabulary_modules(shape)
    if tied and module == embedding and (config.saves(embedding) or config.saves(output)):
        # One tensor; PEFT's file has it under both names.
        return f"{PREFIX}{embedding}.weight", f"{PREFIX}{output}.weight"
    stored = config.stored_name(module)
    if config.saves(module):
        if is_expert(module):
            raise Refused(
                f"{_where(config)}: {module} is an expert's, and experts are trained by factors alone; name none"
            )
        if config.targets(module):
            raise Refused(
                f"{module} is both in modules_to_save and a target of the adapter; leave it out of one of them"
            )
        return (f"{PREFIX}{stored}.{kind}",)
    if kind != "bias" or config.bias == "none":
        return ()
    if config.targets(module):
        return (f"{PREFIX}{module}.base_layer.bias",)
    return (f"{PREFIX}{hf_name}",) if config.bias == "all" else ()


def _refuse_part(
    config: AdapterConfig, hf_names: tuple[str, ...], members: tuple[tuple[str, ...], ...]
) -> None:
    trained = [name for name, names in zip(hf_names, members, strict=True) if names]
    frozen = [name for name, names in zip(hf_names, members, strict=True) if not names]
    raise Refused(
        f"{_where(config)}: {trained[0]} without {frozen[0]} is not supported, since they are one matrix here; "
        f"name {' '.join(name.split('.')[-2] for name in hf_names)} or none of them"
    )


def _where(config: AdapterConfig) -> str:
    return f"{config.path}: modules_to_save" if config.path is not None else "--lora-modules-to-save"
