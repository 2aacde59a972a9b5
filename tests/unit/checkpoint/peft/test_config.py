from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mindspeed_lora.checkpoint.peft.config import AdapterConfig
from mindspeed_lora.checkpoint.peft.config_file import parse_adapter_config
from mindspeed_lora.errors import Refused

MINIMAL: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
Q3 = "model.layers.3.self_attn.q_proj"


def parse(**values: Any) -> AdapterConfig:
    return parse_adapter_config(Path("adapter_config.json"), {**MINIMAL, **values})


def test_scaling():
    assert parse().scaling_of(Q3) == 2.0
    assert parse(use_rslora=True).scaling_of(Q3) == 4.0


def test_what_peft_itself_writes_is_accepted(tmp_path: Path):
    import json

    from peft import LoraConfig

    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    config = parse_adapter_config(tmp_path, json.loads((tmp_path / "adapter_config.json").read_text()))
    assert (config.r, config.alpha, config.target_modules) == (4, 8.0, ("q_proj",))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("use_qalora", True),
        ("layer_replication", [[0, 2]]),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("alora_invocation_tokens", [1]),
        ("megatron_config", {"a": 1}),
        ("a_switch_of_tomorrow", True),
        ("a_number_of_tomorrow", 0.5),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "loftq"),
    ],
)
def test_keys_that_are_refused_by_name(key: str, value: Any):
    with pytest.raises(Refused, match=f"adapter_config.json: {key} "):
        parse(**{key: value})


@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": False, "rank_pattern": {}, "modules_to_save": None, "layer_replication": None},
        {"a_switch_of_tomorrow": False, "a_list_of_tomorrow": []},
        {"inference_mode": True, "peft_version": "0.21.2", "revision": "main", "auto_mapping": {"a": 1}},
        {"loftq_config": {"bits": 4}, "eva_config": {"rho": 2}, "init_lora_weights": "eva"},
        {"lora_dropout": 0.1, "init_lora_weights": "gaussian", "megatron_core": "megatron.core"},
    ],
)
def test_keys_without_effect(values: dict[str, Any]):
    assert parse(**values).r == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
        ({"r": 0}, "r is 0; expected a positive whole number"),
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'; expected a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; expected a number"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0; expected a number from 0 to below 1"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'; expected true or false"),
        ({"r": True}, "r is True"),
        (
            {"rank_pattern": {"q_proj": 0}},
            "rank_pattern is .*; expected an object of .* positive whole numbers",
        ),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is "),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: '\\(' is no regular expression"),
        ({"alpha_pattern": {"q_proj": "2"}}, "alpha_pattern is .* and numbers"),
        ({"exclude_modules": "("}, "exclude_modules: '\\(' is no regular expression"),
        ({"target_modules": ["q_proj", 3]}, "target_modules is .*; expected a list of names"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform is .*; expected numbers of layers"),
        ({"layers_to_transform": 1, "layers_pattern": ["("]}, "layers_pattern: '\\(' is no regular"),
        ({"layers_pattern": "layers"}, "layers_pattern says nothing without layers_to_transform"),
        ({"layers_to_transform": 1, "target_modules": ".*q"}, "layers_to_transform cannot go with"),
        ({"layers_to_transform": [0], "target_modules": "all-linear"}, "layers_to_transform cannot go with"),
        ({"bias": "some"}, "bias is 'some'; expected one of none, all, lora_only"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; expected a list of names"),
        ({"modules_to_save": ["("]}, "modules_to_save: '\\(' is no regular expression"),
        ({"trainable_token_indices": [1, -1]}, "trainable_token_indices is .*; expected numbers of tokens"),
        ({"trainable_token_indices": {"lm_head": 3}}, "trainable_token_indices is "),
        ({"trainable_token_indices": [4, 4]}, "trainable_token_indices names a token twice"),
        ({"ensure_weight_tying": 1}, "ensure_weight_tying is 1; expected true or false"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3; expected a text"),
        ({"target_modules": None}, "target_modules is missing or empty"),
        ({"target_modules": []}, "target_modules is missing or empty"),
    ],
)
def test_values_that_are_wrong(values: dict[str, Any], message: str):
    with pytest.raises(Refused, match=message):
        parse(**values)


def test_missing_rank():
    values = {key: value for key, value in MINIMAL.items() if key != "r"}
    with pytest.raises(Refused, match="adapter_config.json: r is missing"):
        parse_adapter_config(Path("adapter_config.json"), values)


@pytest.mark.parametrize(
    ("values", "hits"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["proj"]}, False),
        ({"target_modules": [Q3]}, True),
        ({"target_modules": ["self_attn.q_proj"]}, True),
        ({"target_modules": r".*\.(q|v)_proj"}, True),
        ({"target_modules": "q_proj"}, False),
        ({"target_modules": "all-linear"}, True),
        ({"layers_to_transform": [3]}, True),
        ({"layers_to_transform": 2}, False),
        ({"layers_to_transform": 0, "target_modules": [Q3]}, True),
        ({"layers_to_transform": [2]}, False),
        ({"layers_to_transform": [3], "layers_pattern": ["(layers|h)"]}, True),
        ({"layers_to_transform": [3], "layers_pattern": "layers"}, True),
        ({"layers_to_transform": [3], "layers_pattern": ["blocks"]}, False),
        ({"exclude_modules": ["q_proj"]}, False),
        ({"exclude_modules": r".*layers\.3\..*"}, False),
        ({"exclude_modules": ["k_proj"]}, True),
        ({"modules_to_save": ["lm_head", "self_attn"]}, False),
        ({"modules_to_save": ["proj"]}, True),
    ],
)
def test_which_modules_are_targeted(values: dict[str, Any], hits: bool):
    assert parse(**values).targets(Q3) is hits


def test_all_linear_leaves_the_vocabulary_out():
    config = parse(target_modules="all-linear")
    assert not config.targets("lm_head") and not config.targets("model.embed_tokens")


def test_patterns_take_the_first_key_that_means_a_module():
    config = parse(
        rank_pattern={r"layers\.3\..*": 2, "q_proj": 8}, alpha_pattern={"^model.*q_proj": 3}, use_rslora=True
    )
    other = "model.layers.13.self_attn.q_proj"
    assert (config.rank_of(Q3), config.rank_of(other), config.rank_of("lm_head")) == (2, 8, 4)
    assert (config.alpha_of(other), config.alpha_of("lm_head")) == (3, 8)
    assert config.scaling_of(other) == pytest.approx(3 / 8**0.5)


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*layers\.3\..*"},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"], "use_rslora": True},
        {"layers_to_transform": [0, 3], "layers_pattern": ["layers"], "rank_pattern": {"q_proj": 2}},
        {"layers_to_transform": 3, "alpha_pattern": {"q_proj": 2.5}, "init_lora_weights": "gaussian"},
        {"bias": "lora_only", "modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [5, 3]},
        {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [1]}},
        {"revision": "main", "base_model_name_or_path": "some/model", "lora_dropout": 0.25},
    ],
)
def test_written_as_it_was_read(values: dict[str, Any]):
    from peft import LoraConfig

    written = parse(**values).to_json()
    assert {key: written[key] for key in values} == values
    assert set(written) <= set(LoraConfig().to_dict())
    assert parse(**written) == parse(**values)
