"""What an ``adapter_config.json`` of PEFT says, and which modules, ranks and scalings follow from it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mindspeed_lora.checkpoint.peft.expert_names import (
    FUSED,
    GATE_UP,
    PER_EXPERT,
    is_expert,
    parameter_of,
    todays_module,
)
from mindspeed_lora.checkpoint.peft.rules import (
    Names,
    Patterns,
    is_all_linear,
    is_kept_from_adapters,
    is_saved,
    layer_index,
    matcher,
    matches,
)

CONFIG_FILE = "adapter_config.json"

TokenIndices = tuple[int, ...] | Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """An adapter's configuration, in the form in which its file says it."""

    path: Path | None = None
    """The file; None for an adapter that is made anew."""
    r: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    target_modules: Names
    """Module names (suffixes), a regular expression, or ``all-linear``."""
    target_parameters: tuple[str, ...] = ()
    """Parameters (suffixes of their names): an expert's matrices as one, or a linear's ``weight``."""
    moe_format: str = PER_EXPERT
    """Whose modules the names are: transformers 4's, one for each expert (``per-expert``), or 5's (``fused``)."""
    separate_gate_up: bool = False
    """In a fused gate_up_proj gate and up have factors of their own: the upper and the lower half of A's rows, and of B
    two blocks with zeros beside them."""
    exclude_modules: Names | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: Names | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"
    """``none``, ``all``, or ``lora_only``: those of the modules with an adapter."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole, by the ends of their names."""
    ensure_weight_tying: bool = False
    trainable_token_indices: TokenIndices | None = None
    """Tokens whose rows are trained: of the embedding, or by module."""
    init_lora_weights: bool | str = True
    base_model_name: str | None = None
    revision: str | None = None

    def targets(self, module: str) -> bool:
        """Whether PEFT would put an adapter on the module of this full name, by its own rules.

        An expert's matrix always has the name of transformers 4 here, whatever the form of the names in the file.
        """
        if self.by_parameter(module):
            return True
        if self.moe_format == FUSED and is_expert(module):
            return False
        return self._targets_module(self.stored_name(module))

    def by_parameter(self, module: str) -> bool:
        """Whether ``target_parameters`` means the module's matrix; exclusions and layers do not count there."""
        return bool(self.target_parameters) and self._means_parameter(parameter_of(module))

    def _targets_module(self, module: str) -> bool:
        if self.exclude_modules is not None and self._excludes(module):
            return False
        if is_kept_from_adapters(self.modules_to_save, module):
            return False
        if is_all_linear(self.target_modules):
            return not matches(("lm_head", "embed_tokens"), module)
        if not self._means_module(module):
            return False
        # PEFT looks at layers for suffixes alone: an expression or a full name is a choice of layers by itself.
        by_suffix = not isinstance(self.target_modules, str) and module not in self._full_names
        return not (self.layers and by_suffix) or layer_index(module, self.layer_lists) in self.layers

    def saves(self, module: str) -> bool:
        """Whether PEFT would train the module of this full name whole."""
        return bool(self.modules_to_save) and is_saved(self.modules_to_save, self.stored_name(module))

    def stored_name(self, module: str) -> str:
        """What a module is called in the adapter's file."""
        return todays_module(module) if self.moe_format == FUSED else module

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers with an adapter; empty for all."""
        chosen = self.layers_to_transform
        return (chosen,) if isinstance(chosen, int) else chosen or ()

    @property
    def layer_lists(self) -> tuple[str, ...]:
        """Names of the lists of layers; empty where they are found by themselves."""
        pattern = self.layers_pattern
        return (pattern,) if isinstance(pattern, str) else pattern or ()

    def rank_of(self, module: str) -> int:
        """Rank on the module of this full name."""
        key = self._ranks.key(self._name_in_patterns(module)) if self.rank_pattern else None
        rank = self.r if key is None else self.rank_pattern[key]
        return rank // 2 if self._is_half(module) else rank

    def alpha_of(self, module: str) -> float:
        """Alpha on the module of this full name."""
        key = self._alphas.key(self._name_in_patterns(module)) if self.alpha_pattern else None
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        # With half of the rank, the same scaling.
        return alpha / (math.sqrt(2) if self.use_rslora else 2) if self._is_half(module) else alpha

    def scaling_of(self, module: str) -> float:
        """The factor on ``B·A`` of a module: ``α / r``, or ``α / √r`` for rank-stabilised LoRA."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def _name_in_patterns(self, module: str) -> str:
        """The name that PEFT looks up in its patterns."""
        return parameter_of(module) if self.by_parameter(module) else self.stored_name(module)

    def _is_half(self, module: str) -> bool:
        return self.separate_gate_up and is_expert(module) and parameter_of(module).endswith(GATE_UP)

    @cached_property
    def _ranks(self) -> Patterns:
        return Patterns(self.rank_pattern)

    @cached_property
    def _alphas(self) -> Patterns:
        return Patterns(self.alpha_pattern)

    @cached_property
    def _means_module(self) -> Callable[[str], bool]:
        return matcher(self.target_modules)

    @cached_property
    def _means_parameter(self) -> Callable[[str], bool]:
        return matcher(self.target_parameters)

    @cached_property
    def _excludes(self) -> Callable[[str], bool]:
        return matcher(self.exclude_modules or ())

    @cached_property
    def _full_names(self) -> frozenset[str]:
        return frozenset(self.target_modules)

    def to_json(self) -> dict[str, Any]:
        """The content of the file: no key that PEFT does not know."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model_name,
            "revision": self.revision,
            "inference_mode": True,
            "r": self.r,
            "lora_alpha": _number(self.alpha),
            # PEFT applies none to parameters, and refuses to load an adapter of them that tells one.
            "lora_dropout": 0.0 if self.target_parameters else self.dropout,
            "use_rslora": self.use_rslora,
            "target_modules": _listed(self.target_modules),
            "target_parameters": list(self.target_parameters) or None,
            "exclude_modules": _listed(self.exclude_modules),
            "layers_to_transform": _listed(self.layers_to_transform),
            "layers_pattern": _listed(self.layers_pattern),
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": {key: _number(value) for key, value in self.alpha_pattern.items()},
            "bias": self.bias,
            "fan_in_fan_out": False,
            "init_lora_weights": self.init_lora_weights,
            "modules_to_save": list(self.modules_to_save) or None,
            "ensure_weight_tying": self.ensure_weight_tying,
            "trainable_token_indices": _listed(self.trainable_token_indices),
        }


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Writes the file with its keys sorted, as PEFT has them, and those of the patterns as they stand.

    Of a pattern's keys the first that matches counts, so that sorting them would change what they mean.
    """
    ordered = {key: values[key] for key in sorted(values)}
    (folder / CONFIG_FILE).write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
