"""Adapter → PEFT folder: checked, copied tensor by tensor, with the tokenizer that it was trained with.

The adapter is a PEFT folder, ours or another's, or factors within a Megatron checkpoint, whose model must be known.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import torch

from mindspeed_lora.checkpoint.canonical import VOCABULARY_TENSORS
from mindspeed_lora.checkpoint.conversion.stand_in import stand_in
from mindspeed_lora.checkpoint.formats.hf import origin_of, read_json, shape_of
from mindspeed_lora.checkpoint.formats.model_files import copy_tokenizer_files
from mindspeed_lora.checkpoint.peft.adapter_file import WEIGHTS_FILE, AdapterFile, open_adapter_file
from mindspeed_lora.checkpoint.peft.config import CONFIG_FILE, AdapterConfig, write_config
from mindspeed_lora.checkpoint.peft.contradictions import refuse_contradictions
from mindspeed_lora.checkpoint.peft.expert_names import is_expert
from mindspeed_lora.checkpoint.peft.folder import (
    IDLE,
    PeftAdapter,
    find_adapter,
    in_form_of,
    is_megatron_adapter,
    read_adapter_config,
)
from mindspeed_lora.checkpoint.peft.fused_experts import matrices_of
from mindspeed_lora.checkpoint.peft.megatron_adapter import shape_of_adapted
from mindspeed_lora.checkpoint.peft.moe_form import chosen_moe_format
from mindspeed_lora.checkpoint.peft.source import AdapterSource, adapter_specs, write_adapter
from mindspeed_lora.checkpoint.peft.trained_tensors import PREFIX
from mindspeed_lora.checkpoint.storage.safetensors_writer import SafetensorsWriter
from mindspeed_lora.config.lora import LoraFlags
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


_VOCABULARY_MODULES = {
    family.mapping(name)[0].modules(None)[0] for family in FAMILIES.values() for name in VOCABULARY_TENSORS
}


def export_adapter(
    path: str, target: Path, lora: LoraFlags, base_model_name: str | None, config_dir: Path | None = None
) -> int:
    """Write the adapter that ``path`` means as a PEFT folder; returns the number of its tensors.

    Where its base model is a folder that is here, the adapter is checked against it. The caller makes
    ``target`` a temporary folder. ``config_dir`` has the base model's config.json, for factors within a Megatron
    checkpoint that does not tell its model.
    """
    if is_megatron_adapter(path):
        return _export_megatron(path, target, lora, base_model_name, config_dir)
    folder = find_adapter(path)
    config = read_adapter_config(folder)
    file = open_adapter_file(folder)
    config = in_form_of(config, file)
    modules = _check_tensors(file, config)
    known = _known_shape(config, config_dir)
    if known is not None:
        modules = list(PeftAdapter(folder, known).hf_modules)
    refuse_contradictions(lora, config, modules, known or stand_in(modules))
    if lora.peft_moe_format not in (None, config.moe_format) and any(map(is_expert, modules)):
        if known is None:
            raise Refused(
                f"--peft-moe-format {lora.peft_moe_format}: {folder} has its experts {config.moe_format}, and its base "
                "model is not here to tell their names; name the folder with its config.json with --hf-cfg-dir"
            )
        return _export_anew(AdapterSource(folder, known, lora=lora), target, known, lora, base_model_name)
    target.mkdir(parents=True, exist_ok=True)
    specs = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
    with SafetensorsWriter(target / WEIGHTS_FILE, specs) as writer:
        for name in specs:
            writer.write(name, file.read(name))
    values = read_json(folder / CONFIG_FILE)
    if base_model_name is not None:
        values["base_model_name_or_path"] = base_model_name
    write_config(target, values)
    copy_tokenizer_files(folder, target)
    return len(specs)


def _known_shape(config: AdapterConfig, config_dir: Path | None) -> ModelShape | None:
    """The shape of the adapter's model, where its config.json is here."""
    for folder in (config_dir, Path(config.base_model_name or "")):
        if folder is not None and (folder / "config.json").is_file():
            return shape_of(folder)
    return None


def _export_anew(
    adapter: AdapterSource, target: Path, shape: ModelShape, lora: LoraFlags, base_model_name: str | None
) -> int:
    """Write an adapter's tensors again, in the form of experts that is asked for; returns their number."""
    config = dataclasses.replace(
        adapter.config, base_model_name=base_model_name or adapter.config.base_model_name
    )
    if shape.moe is not None:
        separate = "experts.linear_fc1" not in adapter.shared
        config = chosen_moe_format(config, adapter.linears, lora.peft_moe_format, separate)
    dtypes = {entry.dtype for entry in adapter.file.entries.values()}
    if len(dtypes) > 1:
        raise Refused(
            f"{adapter.path}: the factors have the dtypes {' and '.join(sorted(map(str, dtypes)))}; expected one."
        )
    write_adapter(target, adapter.shape, config, adapter.spec, adapter.value, dtypes.pop())
    copy_tokenizer_files(adapter.path, target)
    return len(adapter_specs(adapter.shape, config, adapter.spec, torch.float32))


def _export_megatron(
    path: str, target: Path, lora: LoraFlags, base_model_name: str | None, config_dir: Path | None
) -> int:
    """Write the factors of a Megatron checkpoint as a PEFT folder, in their dtype."""
    shape = shape_of_adapted(Path(path), config_dir)
    adapter = AdapterSource(path, shape, lora=lora)
    refuse_contradictions(lora, adapter.config, adapter.hf_modules, shape)
    known = origin_of(config_dir).name if config_dir is not None else None
    count = _export_anew(
        adapter, target, shape, lora, base_model_name or adapter.config.base_model_name or known
    )
    if config_dir is not None:
        copy_tokenizer_files(config_dir, target)
    return count


def _check_tensors(file: AdapterFile, config: AdapterConfig) -> list[str]:
    """Full names of the modules with factors; each must have both, of the configured rank."""
    modules: dict[str, set[str]] = {}
    named: list[str] = []
    for name, entry in file.entries.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            _check_trained(file, name, config)
            continue
        factors = modules.setdefault(match["module"], set())
        rank = entry.shape[0 if match["factor"] == "A" else -1] if len(entry.shape) == 2 else 0
        matrices, count = matrices_of(match["module"], rank, file.entries, config)
        expected = config.rank_of(matrices[0]) * count
        if rank != expected:
            raise Refused(
                f"{file.path}: {name} has shape {list(entry.shape)}, which is not of rank {expected}."
            )
        if not factors:
            named += matrices
        factors.add(match["factor"])
    for module, factors in modules.items():
        if len(factors) == 1:
            raise Refused(f"{file.path}: {module} has lora_{min(factors)} only; the adapter is incomplete.")
    if not modules:
        raise Refused(f"{file.path}: holds no factors.")
    return named


def _check_trained(file: AdapterFile, name: str, config: AdapterConfig) -> None:
    """A tensor that is no factor is one of the base that the configuration trains."""
    module = name.removeprefix(PREFIX).rpartition(".")[0].removesuffix(".base_layer")
    biased = config.bias != "none" and name.endswith(".bias")
    # Tied, trained row by row, or as PEFT keeps them where a vocabulary was resized.
    of_vocabulary = module.removesuffix(".token_adapter") in _VOCABULARY_MODULES
    known = config.saves(module) or biased or of_vocabulary or IDLE.search(name) is not None
    if not (name.startswith(PREFIX) and known):
        raise Refused(
            f"{file.path}: {name} is no LoRA factor of a linear, nor does modules_to_save or bias mean it."
        )
