"""Adapter → PEFT folder: checked, copied tensor by tensor, with the tokenizer that it was trained with."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mindspeed_lora.checkpoint.canonical import LINEARS
from mindspeed_lora.checkpoint.hf import read_json, shape_of
from mindspeed_lora.checkpoint.model_files import copy_tokenizer_files
from mindspeed_lora.checkpoint.peft import WEIGHTS_FILE, PeftAdapter, find_adapter, read_adapter_config
from mindspeed_lora.checkpoint.peft_config import CONFIG_FILE, AdapterConfig
from mindspeed_lora.checkpoint.safetensors_file import SafetensorsFile
from mindspeed_lora.checkpoint.safetensors_writer import SafetensorsWriter
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families.llama import LLAMA_TABLE

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


def check_lora_flags(lora: LoraConfig, config: AdapterConfig, modules: list[str]) -> None:
    """Refuse ``--lora-r``, ``--lora-alpha`` or ``--lora-target-modules`` that contradict the adapter.

    ``modules`` are the full Hugging Face names of the modules that carry it.
    """
    for flag, given, found in (
        ("--lora-r", lora.lora_r, config.r),
        ("--lora-alpha", lora.lora_alpha, config.alpha),
    ):
        if given is not None and given != found:
            raise Refused(f"{flag} {given} contradicts {config.path}, which has {found:g}; leave it out.")
    if lora.lora_target_modules is None:
        return
    wanted = {target for name in lora.lora_target_modules for target in hf_targets(name)}
    found_targets = {module.rpartition(".")[2] for module in modules}
    if wanted != found_targets:
        raise Refused(
            f"--lora-target-modules {' '.join(lora.lora_target_modules)} contradicts {config.path}, whose "
            f"adapter is on {', '.join(sorted(found_targets))}; leave it out."
        )


def hf_targets(name: str) -> tuple[str, ...]:
    """The Hugging Face names of a linear given by Megatron's name; a Hugging Face name stands for itself."""
    if name not in LINEARS:
        return (name,)
    pattern = f"decoder.layers.{{layer}}.{LINEARS[name]}.weight"
    return next(mapping.targets for mapping in LLAMA_TABLE if mapping.canonical == pattern)


def export_adapter(path: str, target: Path, lora: LoraConfig, base_model_name: str | None) -> int:
    """Write the adapter that ``path`` means as a PEFT folder; returns the number of its tensors.

    Where its base model is a folder that is here, the adapter is checked against it. The caller makes
    ``target`` a temporary folder.
    """
    folder = find_adapter(path)
    config = read_adapter_config(folder)
    file = SafetensorsFile(folder / WEIGHTS_FILE)
    modules = _check_pairs(file, config)
    check_lora_flags(lora, config, modules)
    if config.base_model_name and (Path(config.base_model_name) / "config.json").is_file():
        PeftAdapter(folder, shape_of(Path(config.base_model_name)))
    target.mkdir(parents=True, exist_ok=True)
    specs = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
    with SafetensorsWriter(target / WEIGHTS_FILE, specs) as writer:
        for name in specs:
            writer.write(name, file.read(name))
    values = read_json(folder / CONFIG_FILE)
    if base_model_name is not None:
        values["base_model_name_or_path"] = base_model_name
    (target / CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_tokenizer_files(folder, target)
    return len(specs)


def _check_pairs(file: SafetensorsFile, config: AdapterConfig) -> list[str]:
    """Full names of the modules in the file; each must have both factors, of the configured rank."""
    modules: dict[str, set[str]] = {}
    for name, entry in file.entries.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise Refused(f"{file.path}: {name} is no LoRA factor of a linear.")
        modules.setdefault(match["module"], set()).add(match["factor"])
        rank = entry.shape[0 if match["factor"] == "A" else -1] if len(entry.shape) == 2 else None
        if rank != config.r:
            raise Refused(
                f"{file.path}: {name} has shape {list(entry.shape)}, which is not of rank {config.r}."
            )
    for module, factors in modules.items():
        if len(factors) == 1:
            raise Refused(f"{file.path}: {module} has lora_{min(factors)} only; the adapter is incomplete.")
    if not modules:
        raise Refused(f"{file.path}: holds no tensors.")
    return list(modules)
