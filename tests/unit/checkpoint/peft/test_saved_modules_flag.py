"""--lora-modules-to-save, --lora-bias and --lora-ensure-weight-tying on a model, in PEFT's form."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mindspeed_lora.adapters.spec import AdapterSpec
from mindspeed_lora.checkpoint.peft.saved_modules_flag import peft_modules_to_save
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from tests.support.adapters import new_adapter

SHAPE = ModelShape(
    family="qwen3",
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=64,
    max_position_embeddings=32,
    qk_layernorm=True,
    add_qkv_bias=True,
)
TIED = dataclasses.replace(SHAPE, untie_embeddings_and_output_weights=False)


def spec(shape: ModelShape = SHAPE, **flags: Any) -> AdapterSpec:
    return new_adapter(shape, **{"lora_target_modules": ("q_proj", "linear_fc2"), **flags}).spec


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("embed_tokens", ["embed_tokens"]),
        ("model.embed_tokens", ["model.embed_tokens"]),
        ("word_embeddings", ["embed_tokens"]),
        ("embedding", ["embed_tokens"]),
        ("output_layer", ["lm_head"]),
        ("lm_head", ["lm_head"]),
        ("final_layernorm", ["model.norm"]),
        ("norm", ["norm"]),
        ("input_layernorm", ["input_layernorm"]),
        ("pre_mlp_layernorm", ["post_attention_layernorm"]),
        ("q_layernorm", ["q_norm"]),
        ("linear_fc1", ["gate_proj", "up_proj"]),
        ("mlp", ["mlp"]),
        ("layers.1.mlp", ["layers.1.mlp"]),
        (
            r"decoder\.layers\.1\..*norm",
            [
                f"model.layers.1.{name}"
                for name in (
                    "input_layernorm",
                    "post_attention_layernorm",
                    "self_attn.q_norm",
                    "self_attn.k_norm",
                )
            ],
        ),
        (r".*\.(q|k)_norm", ["q_norm", "k_norm"]),
        (r"output_layer|.*final_layernorm", ["model.norm", "lm_head"]),
    ],
)
def test_names_and_expressions(name: str, saved: list[str]) -> None:
    assert sorted(peft_modules_to_save([name], SHAPE)) == sorted(saved)


@pytest.mark.parametrize("name", ["classifier", "", "(", "linear_kqv", "decoder.layers.2.mlp"])
def test_what_means_nothing(name: str) -> None:
    with pytest.raises(Refused) as error:
        peft_modules_to_save(["lm_head", name], SHAPE)
    assert f"--lora-modules-to-save: the model has no module {name}; it has word_embeddings, " in str(
        error.value
    )


def test_what_is_trained() -> None:
    found = spec(lora_modules_to_save=("norm", "lm_head"), lora_layers_to_transform=(1,))
    names = [tensor.name for tensor in found.trained]
    assert len(names) == 2 * 4 + 2 and names[-1] == "output_layer.weight"
    assert found.trained[-1].members == (("base_model.model.lm_head.weight",),) and not found.untied
    assert found.describe().endswith("k_layernorm, final_layernorm, output_layer")


def test_biases() -> None:
    bias = "base_model.model.model.layers.0.self_attn.{}.bias"
    assert not spec().trained
    whole, _ = spec(lora_bias="all").trained
    names = ("q_proj.base_layer", "k_proj", "v_proj")
    assert whole.members == tuple((bias.format(name),) for name in names) and whole.is_whole
    part, _ = spec(lora_bias="lora_only").trained
    assert part.members == ((bias.format(names[0]),), (), ()) and not part.is_whole


def test_a_tied_model_comes_apart_unless_it_must_not() -> None:
    assert not spec(TIED, lora_modules_to_save=("norm",)).untied
    for name, trained in (
        ("lm_head", "output_layer.weight"),
        ("embed_tokens", "embedding.word_embeddings.weight"),
    ):
        plan = new_adapter(TIED, lora_modules_to_save=(name,))
        assert plan.spec.untied and plan.shape == SHAPE
        assert [tensor.name for tensor in plan.spec.trained] == [trained]
        kept = new_adapter(TIED, lora_modules_to_save=(name,), lora_ensure_weight_tying=True)
        assert not kept.spec.untied and kept.shape == TIED
        (tensor,) = kept.spec.trained
        assert tensor.name == "embedding.word_embeddings.weight" and len(tensor.members[0]) == 2


@pytest.mark.parametrize(
    ("shape", "flags", "words"),
    [
        (
            SHAPE,
            {"lora_modules_to_save": ("k_proj",)},
            "k_proj.weight without .*q_proj.weight is not supported, .* one matrix",
        ),
        (SHAPE, {"lora_modules_to_save": ("down_proj",)}, "leave no module|down_proj"),
        (SHAPE, {"lora_modules_to_save": ("proj",)}, "both in modules_to_save and a target of the adapter"),
        (SHAPE, {"lora_modules_to_save": ("lm_head",), "lora_ensure_weight_tying": True}, "is not tied"),
        (TIED, {"lora_ensure_weight_tying": True}, "names neither embed_tokens nor lm_head"),
        (
            dataclasses.replace(SHAPE, add_qkv_bias=False),
            {"lora_bias": "all"},
            "the model has no bias; leave",
        ),
        (
            SHAPE,
            {"lora_bias": "lora_only", "lora_target_modules": ("o_proj",)},
            "no bias on the modules with",
        ),
    ],
)
def test_what_is_refused(shape: ModelShape, flags: dict[str, Any], words: str) -> None:
    flags = {"lora_target_modules": ("down_proj",), **flags}
    with pytest.raises(Refused, match=words):
        spec(shape, **flags)
