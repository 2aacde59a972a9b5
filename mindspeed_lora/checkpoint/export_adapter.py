"""Adapter → PEFT folder: checked, copied tensor by tensor, with the tokenizer that it was trained with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from mindspeed_lora.checkpoint.adapter_contradictions import refuse_contradictions
from mindspeed_lora.checkpoint.hf import read_json, shape_of
from mindspeed_lora.checkpoint.model_files import copy_tokenizer_files
from mindspeed_lora.checkpoint.peft import IDLE, WEIGHTS_FILE, PeftAdapter, find_adapter, read_adapter_config
from mindspeed_lora.checkpoint.peft_config import CONFIG_FILE, AdapterConfig
from mindspeed_lora.checkpoint.peft_rules import layer_index
from mindspeed_lora.checkpoint.safetensors_file import SafetensorsFile
from mindspeed_lora.checkpoint.safetensors_writer import SafetensorsWriter
from mindspeed_lora.checkpoint.trained_tensors import PREFIX
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


def export_adapter(path: str, target: Path, lora: LoraConfig, base_model_name: str | None) -> int:
    """Write the adapter that ``path`` means as a PEFT folder; returns the number of its tensors.

    Where its base model is a folder that is here, the adapter is checked against it. The caller makes
    ``target`` a temporary folder.
    """
    folder = find_adapter(path)
    config = read_adapter_config(folder)
    file = SafetensorsFile(folder / WEIGHTS_FILE)
    modules = _check_tensors(file, config)
    refuse_contradictions(lora, config, modules, _stand_in(modules))
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


def _stand_in(modules: Iterable[str]) -> ModelShape:
    """A shape with the modules of the adapter's model, which need not be here; its sizes mean nothing."""
    numbers = [layer_index(module, ()) for module in modules]
    return ModelShape(
        family="qwen3",
        num_layers=1 + max(number or 0 for number in numbers),
        hidden_size=2,
        ffn_hidden_size=2,
        num_attention_heads=2,
        num_query_groups=2,
        kv_channels=2,
        vocab_size=2,
        max_position_embeddings=2,
        qk_layernorm=True,
    )


def _check_tensors(file: SafetensorsFile, config: AdapterConfig) -> list[str]:
    """Full names of the modules with factors; each must have both, of the configured rank."""
    modules: dict[str, set[str]] = {}
    for name, entry in file.entries.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            _check_trained(file, name, config)
            continue
        modules.setdefault(match["module"], set()).add(match["factor"])
        rank = entry.shape[0 if match["factor"] == "A" else -1] if len(entry.shape) == 2 else None
        expected = config.rank_of(match["module"])
        if rank != expected:
            raise Refused(
                f"{file.path}: {name} has shape {list(entry.shape)}, which is not of rank {expected}."
            )
    for module, factors in modules.items():
        if len(factors) == 1:
            raise Refused(f"{file.path}: {module} has lora_{min(factors)} only; the adapter is incomplete.")
    if not modules:
        raise Refused(f"{file.path}: holds no factors.")
    return list(modules)


def _check_trained(file: SafetensorsFile, name: str, config: AdapterConfig) -> None:
    """A tensor that is no factor is one of the base that the configuration trains."""
    module = name.removeprefix(PREFIX).rpartition(".")[0].removesuffix(".base_layer")
    biased = config.bias != "none" and name.endswith(".bias")
    # Tied, trained row by row, or as PEFT keeps them where a vocabulary was resized.
    of_vocabulary = module.removesuffix(".token_adapter") in ("model.embed_tokens", "lm_head")
    known = config.saves(module) or biased or of_vocabulary or IDLE.search(name) is not None
    if not (name.startswith(PREFIX) and known):
        raise Refused(
            f"{file.path}: {name} is no LoRA factor of a linear, nor does modules_to_save or bias mean it."
        )
