"""PEFT's ``adapter_config.json``: every key is honoured, known to change nothing here, or refused by name."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_lora.errors import Refused

CONFIG_FILE = "adapter_config.json"
ALL_LINEAR = "all-linear"

HONOURED = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "bias",
        "base_model_name_or_path",
        "revision",
    }
)

WITHOUT_EFFECT = frozenset(
    {
        # Book-keeping of PEFT.
        "auto_mapping",
        "inference_mode",
        "peft_version",
        "runtime_config",
        "task_type",
        # How A and B were drawn; here they are given. Methods that also change the base are refused by the
        # value of init_lora_weights.
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        # Only read together with a switch that is refused when it is on.
        "megatron_core",
        "qalora_group_size",
    }
)
"""Keys whose value does not change what a given A and B compute."""

INITS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class AdapterConfig:
    """What an ``adapter_config.json`` says."""

    path: Path
    r: int
    alpha: float
    dropout: float
    use_rslora: bool
    target_modules: tuple[str, ...] | str
    """Module names (suffixes), a regular expression, or ``all-linear``."""
    exclude_modules: tuple[str, ...] | str | None
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    base_model_name: str | None
    revision: str | None

    @property
    def scaling(self) -> float:
        """``α / r``, or ``α / √r`` for rank-stabilised LoRA."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def targets(self, module: str) -> bool:
        """Whether PEFT would put an adapter on the module of this full name, by its own rules."""
        if self.exclude_modules is not None and _matches(self.exclude_modules, module):
            return False
        if self.target_modules == ALL_LINEAR:
            return re.fullmatch(r"lm_head|.*embed_tokens", module) is None
        if not _matches(self.target_modules, module):
            return False
        return self.layers_to_transform is None or self._layer(module) in self.layers_to_transform

    def _layer(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern] or [
            r".*?\.[^.]*\.(\d+)\."
        ]
        for pattern in patterns:
            match = re.match(pattern, module)
            if match:
                return int(match.group(1))
        return None


def _matches(wanted: tuple[str, ...] | str, module: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def parse_adapter_config(path: Path, values: dict[str, Any]) -> AdapterConfig:
    """Read a parsed ``adapter_config.json``; ``path`` is only for messages."""
    _check_keys(path, values)
    try:
        rank, alpha = values["r"], float(values["lora_alpha"])
        layers = values.get("layers_to_transform")
        config = AdapterConfig(
            path=path,
            r=rank,
            alpha=alpha,
            dropout=float(values.get("lora_dropout") or 0.0),
            use_rslora=bool(values.get("use_rslora", False)),
            target_modules=_names(values.get("target_modules")) or (),
            exclude_modules=_names(values.get("exclude_modules")),
            layers_to_transform=tuple(layers)
            if isinstance(layers, list)
            else None
            if layers is None
            else (layers,),
            layers_pattern=_as_tuple(values.get("layers_pattern")),
            base_model_name=values.get("base_model_name_or_path"),
            revision=values.get("revision"),
        )
    except KeyError as error:
        raise Refused(f"{path}: {error.args[0]} is missing.") from error
    except (TypeError, ValueError) as error:
        raise Refused(f"{path}: a value has an unexpected type ({error}).") from error
    if not isinstance(rank, int) or rank < 1:
        raise Refused(f"{path}: r is {rank!r}; expected a positive whole number.")
    if not config.target_modules:
        raise Refused(f"{path}: target_modules is missing or empty.")
    return config


def _check_keys(path: Path, values: dict[str, Any]) -> None:
    if values.get("peft_type") != "LORA":
        raise Refused(f"{path}: peft_type is {values.get('peft_type')!r}; expected 'LORA'.")
    for key, value in values.items():
        switched_on = value not in (None, False, [], {})
        if switched_on and key not in HONOURED and key not in WITHOUT_EFFECT:
            raise Refused(f"{path}: {key} ({value!r}) is not supported.")
    if values.get("bias", "none") != "none":
        raise Refused(f"{path}: bias {values['bias']!r} is not supported; expected 'none'.")
    init = values.get("init_lora_weights", True)
    if init not in INITS_THAT_KEEP_THE_BASE:
        raise Refused(
            f"{path}: init_lora_weights {init!r} is not supported, since it also changes the base weights; "
            "save the adapter converted to plain LoRA (path_initial_model_for_weight_conversion)."
        )


def _names(value: Any) -> tuple[str, ...] | str | None:
    return value if isinstance(value, str) or not value else tuple(value)


def _as_tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) and value else tuple(value or ())
