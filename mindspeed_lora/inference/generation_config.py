"""What ``generation_config.json`` of a model's folder says about generating with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_lora.errors import Refused

_NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1, 1.0),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "sequence_bias": (),
    "stop_strings": (),
    "suppress_tokens": (),
}
"""Keys by which transformers' greedy answer differs from the likeliest tokens → values that do nothing."""


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """The model's own rules; how it samples is up to the command line."""

    eos_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    not_applied: tuple[str, ...] = ()
    """Keys that would change the answers and are not supported, with their values."""


def read_generation_defaults(folder: Path | None) -> GenerationDefaults:
    """The rules of a model's folder; without ``generation_config.json`` the end tokens of ``config.json``."""
    values = _read(folder, "generation_config.json")
    if not values:
        values = {"eos_token_id": _read(folder, "config.json").get("eos_token_id")}
    penalty = values.get("repetition_penalty")
    if penalty is not None and not (isinstance(penalty, (int, float)) and penalty > 0):
        raise Refused(f"{folder}/generation_config.json: repetition_penalty is {penalty!r}; expected above 0")
    return GenerationDefaults(
        eos_token_ids=_token_ids(folder, values.get("eos_token_id")),
        repetition_penalty=1.0 if penalty is None else float(penalty),
        not_applied=tuple(
            f"{key} {values[key]}"
            for key, neutral in _NOT_APPLIED.items()
            if values.get(key) not in (None, [], {}, *neutral)
        ),
    )


def _token_ids(folder: Path | None, value: Any) -> tuple[int, ...]:
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) for token in listed):
        raise Refused(f"{folder}: eos_token_id is {value!r}; expected a token's number, or a list of them")
    return tuple(listed)


def _read(folder: Path | None, name: str) -> dict[str, Any]:
    if folder is None:
        return {}
    path = folder / name
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise Refused(f"{path}: expected a JSON object")
    return values
