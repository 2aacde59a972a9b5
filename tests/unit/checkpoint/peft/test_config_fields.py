"""Every field of the installed PEFT's ``LoraConfig`` is honoured, changes nothing here, or is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from mindspeed_lora.checkpoint.peft.config_file import HONOURED, WITHOUT_EFFECT, parse_adapter_config
from mindspeed_lora.errors import Refused

BASE: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
FIELDS = [field.name for field in dataclasses.fields(LoraConfig)]
VALUES: dict[str, Any] = {
    "r": 6,
    "lora_alpha": 9,
    "lora_dropout": 0.25,
    "use_rslora": True,
    "target_parameters": ["mlp.gate_proj.weight"],
    "target_modules": ["v_proj"],
    "exclude_modules": ["k_proj"],
    "layers_to_transform": [1],
    "layers_pattern": ["layers"],
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 3},
    "init_lora_weights": "gaussian",
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "ensure_weight_tying": True,
    "trainable_token_indices": [1, 2],
    "base_model_name_or_path": "some/base",
    "revision": "main",
}
"""A value that is not the default, of each field that is honoured."""


def parse(values: dict[str, Any]) -> dict[str, Any]:
    return parse_adapter_config(Path("adapter_config.json"), values).to_json()


@pytest.mark.parametrize("field", FIELDS)
def test_each_field(field: str) -> None:
    base = {**BASE, "layers_to_transform": [0]} if field == "layers_pattern" else BASE
    if field in HONOURED and field != "peft_type":
        before, after = parse(base), parse({**base, field: VALUES[field]})
        assert {key for key in after if after[key] != before[key]} == {field}
        assert after[field] == VALUES[field]
    elif field in WITHOUT_EFFECT:
        assert parse({**base, field: "anything"}) == parse(base)
    else:
        with pytest.raises(Refused, match=f"adapter_config.json: {field} "):
            parse({**base, field: "anything"})


def test_no_name_is_on_a_list_that_peft_does_not_know() -> None:
    assert set(FIELDS) >= HONOURED | WITHOUT_EFFECT
    assert not HONOURED & WITHOUT_EFFECT


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "loftq", "corda", "mica", "lora_ga"])
def test_starting_values_that_change_the_base(init: str) -> None:
    with pytest.raises(Refused, match=f"init_lora_weights '{init}' is not supported"):
        parse({**BASE, "init_lora_weights": init})


def test_a_key_from_the_future() -> None:
    with pytest.raises(Refused, match=r"adapter_config.json: use_tomorrow \(True\) is not supported"):
        parse({**BASE, "use_tomorrow": True})
    assert parse({**BASE, "use_tomorrow": False}) == parse(BASE)
