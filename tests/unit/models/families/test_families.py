"""config.json of every family, in both styles; what is not built is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mindspeed_lora.config.shape import RopeScaling
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES, check_model_type_hf, shape_from_config

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def config(family: str = "llama", **values: Any) -> dict[str, Any]:
    return {"model_type": family, **SIZES, **values}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_transformers_writes(family: str, tmp_path: Path):
    import transformers

    name = FAMILIES[family].architecture.removesuffix("ForCausalLM")
    getattr(transformers, f"{name}Config")(
        **SIZES, rms_norm_eps=1e-4, tie_word_embeddings=True
    ).save_pretrained(tmp_path)
    shape = shape_from_config(json.loads((tmp_path / "config.json").read_text()))
    assert shape.family == family
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size) == (3, 64, 96)
    assert (shape.num_attention_heads, shape.num_query_groups) == (8, 2)
    assert shape.kv_channels == (128 if family == "qwen3" else 8)
    assert (shape.vocab_size, shape.max_position_embeddings, shape.norm_epsilon) == (100, 128, 1e-4)
    assert not shape.untie_embeddings_and_output_weights
    assert shape.add_qkv_bias == (family == "qwen2") and not shape.add_proj_bias
    assert shape.qk_layernorm == (family == "qwen3")
    assert shape.sliding_window == (4096 if family == "mistral" else None)
    assert shape.rope_scaling is None and shape.rotary_base == 10000.0


def test_llama2_7b_as_published():
    published = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": 32000,
    }
    shape = shape_from_config(published)
    assert (shape.num_query_groups, shape.kv_channels, shape.params_dtype) == (32, 128, "float16")
    assert shape.untie_embeddings_and_output_weights
    assert shape_from_config({**published, "num_key_value_heads": None}) == shape


@pytest.mark.parametrize("scaling", [LLAMA3, {**LLAMA3, "type": "llama3", "rope_type": "llama3"}])
def test_both_styles_of_rope_are_the_same(scaling: dict[str, Any]):
    old = shape_from_config(config(rope_theta=5e5, rope_scaling=scaling, torch_dtype="bfloat16"))
    new = shape_from_config(config(rope_parameters={**LLAMA3, "rope_theta": 5e5}, dtype="bfloat16"))
    assert old == new
    assert old.rotary_base == 5e5
    assert old.rope_scaling == RopeScaling(
        rope_type="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )


def test_linear_rope():
    shape = shape_from_config(config(rope_scaling={"type": "linear", "factor": 4}))
    assert shape.rope_scaling == RopeScaling(rope_type="linear", factor=4.0)


def test_biases_of_llama_and_qwen3():
    shape = shape_from_config(config(attention_bias=True, mlp_bias=True))
    assert shape.add_qkv_bias and shape.add_proj_bias and shape.add_mlp_bias
    shape = shape_from_config(config("qwen3", attention_bias=True))
    assert shape.add_qkv_bias and shape.add_proj_bias and not shape.add_mlp_bias


def test_mistral_without_window_and_default_groups():
    values = config("mistral", sliding_window=None, head_dim=16)
    del values["num_key_value_heads"]
    shape = shape_from_config(values)
    assert (shape.sliding_window, shape.kv_channels, shape.num_query_groups) == (None, 16, 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (config("gpt2"), "model_type 'gpt2' is not supported; supported are llama, mistral, qwen2, qwen3"),
        ({}, "model_type 'None' is not supported"),
        (config(architectures=["LlamaForSequenceClassification"]), "expected LlamaForCausalLM"),
        (config(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
        (
            config(quantization_config={"quant_method": "gptq"}),
            r"quantization_config \(quant_method 'gptq'\)",
        ),
        (config(rope_scaling={"rope_type": "yarn", "factor": 4}), "rope type 'yarn' is not supported"),
        (config(rope_parameters={"rope_type": "dynamic", "factor": 4}), "rope type 'dynamic'"),
        (
            config(rope_scaling={"rope_type": "llama3", "factor": 4}),
            "rope type 'llama3' lacks low_freq_factor",
        ),
        (config(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        (config("qwen2", use_sliding_window=True), "use_sliding_window true is not supported"),
        (config("qwen3", use_sliding_window=True), "use_sliding_window true is not supported"),
        (
            config("qwen2", layer_types=["full_attention", "sliding_attention"]),
            "layer_types sliding_attention",
        ),
        (config("mistral", sliding_window=0), "sliding_window 0 is not a window"),
        (config(num_key_value_heads=3), "num_attention_heads 8 is not a multiple of num_key_value_heads 3"),
        (config(hidden_size=65), "hidden_size 65 is not a multiple of num_attention_heads 8"),
        (config(vocab_size=None), "vocab_size is missing"),
        (config(torch_dtype="float8_e4m3fn"), "dtype float8_e4m3fn is not supported"),
        (config(hidden_size="wide"), "a value has an unexpected type"),
        (config(rope_scaling="linear"), "a value has an unexpected type"),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str):
    with pytest.raises(Refused, match=f"config.json: .*{message}"):
        shape_from_config(values)


def test_model_type_hf():
    check_model_type_hf(None, "qwen3")
    check_model_type_hf("llama2", "qwen2")
    check_model_type_hf("qwen25", "qwen2")
    with pytest.raises(Refused, match="--model-type-hf mixtral contradicts the checkpoint, which is a llama"):
        check_model_type_hf("mixtral", "llama")
