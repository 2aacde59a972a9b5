"""What ``inspect`` tells of a PEFT adapter folder: its configuration, its factors by their headers, and vLLM."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from mindspeed_lora.checkpoint.formats.hf import read_json
from mindspeed_lora.checkpoint.peft.adapter_file import AdapterFile, open_adapter_file
from mindspeed_lora.checkpoint.peft.config import CONFIG_FILE, AdapterConfig
from mindspeed_lora.checkpoint.peft.config_file import is_finite, is_rank, parse_adapter_config
from mindspeed_lora.checkpoint.peft.folder import in_form_of
from mindspeed_lora.checkpoint.peft.fused_experts import matrices_of
from mindspeed_lora.checkpoint.peft.trained_tensors import PREFIX
from mindspeed_lora.checkpoint.peft.vllm_rules import (
    largest_rank,
    max_lora_rank,
    reasons_against,
    serve_command,
)
from mindspeed_lora.errors import Refused

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>A|B)(?:\.weight)?")
_COPIED = (
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
)


def describe_adapter_folder(folder: Path) -> dict[str, Any]:
    """An adapter folder.

    Keys: ``r``, ``lora_alpha``, ``scaling``, ``use_rslora``, ``use_dora``, ``lora_dropout``, ``bias``,
    ``target_modules``, ``target_parameters``, ``exclude_modules``, ``layers_to_transform``, ``rank_pattern``,
    ``alpha_pattern``, ``modules_to_save``, ``trainable_token_indices``; ``base_model``, ``revision``,
    ``peft_version``; ``modules`` (number of adapted matrices), ``ranks`` (number of them by rank), ``parameters``,
    ``dtypes`` (parameters by dtype); ``not_supported``: why this program would not take it, or null; ``vllm``:
    ``loads``, ``reasons`` (why not), ``max_lora_rank`` and ``command``, null where it does not.

    Raises:
        Refused: the folder is damaged or incomplete.
    """
    path = folder / CONFIG_FILE
    values = _checked(path, read_json(path))
    file = open_adapter_file(folder)
    config, problem = _understood(path, values)
    if config is not None:
        config = in_form_of(config, file)
    ranks = _ranks(file, config)
    dtypes: Counter[str] = Counter()
    for entry in file.entries.values():
        dtypes[str(entry.dtype).removeprefix("torch.")] += prod(entry.shape)
    rank, alpha, rslora = values["r"], values["lora_alpha"], bool(values.get("use_rslora"))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "scaling": alpha / (rank**0.5 if rslora else rank),
        "use_rslora": rslora,
        "use_dora": bool(values.get("use_dora")),
        "lora_dropout": values.get("lora_dropout") or 0.0,
        "bias": values.get("bias") or "none",
        **{key: values.get(key) or None for key in _COPIED},
        "base_model": values.get("base_model_name_or_path"),
        "revision": values.get("revision"),
        "peft_version": values.get("peft_version"),
        "modules": len(ranks),
        "ranks": {str(one): count for one, count in sorted(Counter(ranks.values()).items())},
        "parameters": sum(dtypes.values()),
        "dtypes": dict(dtypes.most_common()),
        "not_supported": problem,
        "vllm": _vllm(folder, values, file, config, ranks),
    }


def adapter_tensors(folder: Path) -> list[dict[str, Any]]:
    """Every tensor of an adapter's file."""
    file = open_adapter_file(folder)
    return [
        {
            "name": name,
            "shape": list(entry.shape),
            "dtype": str(entry.dtype).removeprefix("torch."),
            "bytes": entry.num_bytes,
            "parts": [{"name": name, "file": file.path.name, "shape": list(entry.shape)}],
        }
        for name, entry in file.entries.items()
    ]


def _checked(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The configuration, if it is one of a LoRA adapter with what every one has."""
    if values.get("peft_type") != "LORA":
        raise Refused(f"{path}: peft_type is {values.get('peft_type')!r}; expected 'LORA'.")
    pattern = values.get("rank_pattern") or {}
    for key, fits, expected in (
        ("r", is_rank(values.get("r")), "a positive whole number"),
        ("lora_alpha", is_finite(values.get("lora_alpha")), "a number"),
        (
            "rank_pattern",
            isinstance(pattern, dict) and all(map(is_rank, pattern.values())),
            "an object of module names and positive whole numbers",
        ),
    ):
        if not fits:
            raise Refused(f"{path}: {key} is {values.get(key)!r}; expected {expected}.")
    return values


def _understood(path: Path, values: Mapping[str, Any]) -> tuple[AdapterConfig | None, str | None]:
    """The configuration as this program takes it, or why it does not."""
    try:
        return parse_adapter_config(path, values), None
    except Refused as error:
        return None, str(error)


def _ranks(file: AdapterFile, config: AdapterConfig | None) -> dict[str, int]:
    """Rank of each adapted module by its full name; each must have both factors, of one rank."""
    found: dict[str, dict[str, int]] = {}
    for name, entry in file.entries.items():
        match = _FACTOR.fullmatch(name)
        if match is not None and len(entry.shape) == 2:
            rank = entry.shape[0 if match["factor"] == "A" else 1]
            found.setdefault(match["module"], {})[match["factor"]] = rank
    for module, factors in found.items():
        if len(factors) == 1:
            raise Refused(f"{file.path}: {module} has lora_{min(factors)} only; the adapter is incomplete.")
        if factors["A"] != factors["B"]:
            raise Refused(
                f"{file.path}: {module} has lora_A of rank {factors['A']} and lora_B of rank {factors['B']}."
            )
    if config is None:
        return {module: factors["A"] for module, factors in found.items()}
    ranks: dict[str, int] = {}
    for module, factors in found.items():
        matrices, count = matrices_of(module.removeprefix(PREFIX), factors["A"], file.entries, config)
        ranks.update(dict.fromkeys(matrices, factors["A"] // count))
    return ranks


def _vllm(
    folder: Path,
    values: Mapping[str, Any],
    file: AdapterFile,
    config: AdapterConfig | None,
    ranks: Mapping[str, int],
) -> dict[str, Any]:
    reasons = reasons_against(values, file.entries, config)
    # Ranks of patterns that no module has do not matter, those in the file do.
    rank = max([values["r"], *ranks.values()], default=largest_rank(values))
    base = values.get("base_model_name_or_path")
    return {
        "loads": not reasons,
        "reasons": reasons,
        "max_lora_rank": None if reasons else max_lora_rank(rank),
        "command": None if reasons else serve_command(folder, base, rank),
    }
