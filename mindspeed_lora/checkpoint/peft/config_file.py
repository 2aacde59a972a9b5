"""Reading ``adapter_config.json``: every key is honoured, known to change nothing here, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mindspeed_lora.checkpoint.peft.config import AdapterConfig, TokenIndices
from mindspeed_lora.checkpoint.peft.rules import Names, faulty_expression
from mindspeed_lora.errors import Refused

HONOURED = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
        "bias",
        "modules_to_save",
        "ensure_weight_tying",
        "trainable_token_indices",
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

BIASES = ("none", "all", "lora_only")

INITS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


def parse_adapter_config(path: Path, values: Mapping[str, Any]) -> AdapterConfig:
    """Read a parsed ``adapter_config.json``; ``path`` is only for messages.

    Raises:
        Refused: a key is not supported, or a value is not what PEFT takes.
    """
    _check_keys(path, values)
    reader = _Reader(path, values)
    config = AdapterConfig(
        path=path,
        r=reader.checked("r", "a positive whole number", is_rank),
        alpha=float(reader.checked("lora_alpha", "a number", is_finite)),
        dropout=float(reader.checked("lora_dropout", "a number from 0 to below 1", _is_share, 0.0)),
        use_rslora=reader.checked("use_rslora", "true or false", _is_switch, False),
        target_modules=reader.names("target_modules") or (),
        target_parameters=reader.texts("target_parameters"),
        exclude_modules=reader.names("exclude_modules"),
        layers_to_transform=reader.layers("layers_to_transform"),
        layers_pattern=reader.names("layers_pattern"),
        rank_pattern=reader.pattern("rank_pattern", "positive whole numbers", is_rank),
        alpha_pattern=reader.pattern("alpha_pattern", "numbers", is_finite),
        bias=reader.checked("bias", f"one of {', '.join(BIASES)}", lambda value: value in BIASES, "none"),
        modules_to_save=reader.expressions("modules_to_save"),
        ensure_weight_tying=reader.checked("ensure_weight_tying", "true or false", _is_switch, False),
        trainable_token_indices=reader.tokens("trainable_token_indices"),
        init_lora_weights=_init(values),
        base_model_name=reader.text("base_model_name_or_path"),
        revision=reader.text("revision"),
    )
    _check_choice_of_modules(path, config)
    return config


def is_rank(value: Any) -> bool:
    """Whether a value can be a rank."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_finite(value: Any) -> bool:
    """Whether a value is a number, and not NaN or infinite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return is_finite(value) and 0 <= value < 1


class _Reader:
    """Values of one file, each checked; whatever is wrong is one sentence with the file and the key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def refusal(self, key: str, expected: str) -> Refused:
        """The error for a value that is not what is expected."""
        return Refused(f"{self.path}: {key} is {self.values.get(key)!r}; expected {expected}.")

    def checked(self, key: str, expected: str, test: Callable[[Any], bool], default: Any = None) -> Any:
        """A value that passes a test; one that is not there is the default, or refused where there is none."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise Refused(f"{self.path}: {key} is missing.")
            return default
        if not test(value):
            raise self.refusal(key, expected)
        return value

    def text(self, key: str) -> str | None:
        """A text, or None."""
        value = self.values.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self.refusal(key, "a text")

    def names(self, key: str) -> Names | None:
        """A list of names, one expression, or None where neither says anything."""
        value = self.values.get(key)
        if not value or isinstance(value, str):
            self._check_expressions(key, [value] if value else [])
            return value or None
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            raise self.refusal(key, "a list of names, or one text")
        if key == "layers_pattern":
            self._check_expressions(key, value)
        return tuple(value)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of names."""
        value = self.values.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            raise self.refusal(key, "a list of names")
        return tuple(value)

    def expressions(self, key: str) -> tuple[str, ...]:
        """A list of names that PEFT takes for expressions."""
        found = self.texts(key)
        self._check_expressions(key, found)
        return found

    def layers(self, key: str) -> tuple[int, ...] | int | None:
        """Numbers of layers, or one of them."""
        value = self.values.get(key)
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
            raise self.refusal(key, "numbers of layers")
        return (tuple(numbers) or None) if isinstance(value, list) else value

    def tokens(self, key: str) -> TokenIndices | None:
        """Numbers of tokens, or an object of module names and numbers of tokens."""
        value = self.values.get(key)
        lists = list(value.values()) if isinstance(value, dict) else [value or []]
        if not all(isinstance(one, list) and all(map(_is_token, one)) for one in lists):
            raise self.refusal(key, "numbers of tokens, or an object of module names and numbers of tokens")
        if any(len(set(one)) < len(one) for one in lists):
            raise Refused(f"{self.path}: {key} names a token twice.")
        if isinstance(value, dict):
            return {name: tuple(one) for name, one in value.items()} or None
        return tuple(value or ()) or None

    def pattern(self, key: str, expected: str, test: Callable[[Any], bool]) -> dict[str, Any]:
        """An object of expressions over module names and values."""
        value = self.values.get(key) or {}
        if not isinstance(value, dict) or not all(map(test, value.values())):
            raise self.refusal(key, f"an object of module names and {expected}")
        self._check_expressions(key, value)
        return value

    def _check_expressions(self, key: str, expressions: Iterable[str]) -> None:
        fault = faulty_expression(expressions)
        if fault is not None:
            raise Refused(f"{self.path}: {key}: {fault}.")


def _check_keys(path: Path, values: Mapping[str, Any]) -> None:
    if values.get("peft_type") != "LORA":
        raise Refused(f"{path}: peft_type is {values.get('peft_type')!r}; expected 'LORA'.")
    for key, value in values.items():
        switched_on = value not in (None, False, [], {})
        if switched_on and key not in HONOURED and key not in WITHOUT_EFFECT:
            raise Refused(f"{path}: {key} ({value!r}) is not supported.")
    init = values.get("init_lora_weights", True)
    if init not in INITS_THAT_KEEP_THE_BASE:
        raise Refused(
            f"{path}: init_lora_weights {init!r} is not supported, since it also changes the base weights; "
            "save the adapter converted to plain LoRA (path_initial_model_for_weight_conversion)."
        )


def _init(values: Mapping[str, Any]) -> bool | str:
    """How the factors were drawn, kept for the record; what PEFT would do again when it loads them is left out."""
    init = values.get("init_lora_weights", True)
    return init if isinstance(init, bool) or init in ("gaussian", "orthogonal") else True


def _check_choice_of_modules(path: Path, config: AdapterConfig) -> None:
    """What PEFT itself refuses of ``target_modules`` and ``layers_*``."""
    if not config.target_modules and not config.target_parameters:
        raise Refused(f"{path}: target_modules is missing or empty.")
    if isinstance(config.target_modules, str) and (config.layers or config.layers_pattern):
        key = "layers_to_transform" if config.layers else "layers_pattern"
        raise Refused(
            f"{path}: {key} cannot go with target_modules as one text ({config.target_modules!r}); "
            "expected a list of names."
        )
    if config.layers_pattern and not config.layers:
        raise Refused(f"{path}: layers_pattern says nothing without layers_to_transform; add it.")
