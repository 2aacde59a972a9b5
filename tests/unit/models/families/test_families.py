"""config.json of every family, in both styles; what is not built is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_lora.config.model_features import refuse_unbuilt
from mindspeed_lora.config.shape import RopeScaling
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import (
    FAMILIES,
    check_model_type_hf,
    check_w_pack,
    shape_from_config,
)
from mindspeed_lora.models.rope import RotaryPositions, rotary_amplitude, rotary_frequencies

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


CHATGLM = {"num_layers": 2, "ffn_hidden_size": 96, "padded_vocab_size": 100, "seq_length": 64}


def config(family: str = "llama", **values: Any) -> dict[str, Any]:
    return {"model_type": family, **SIZES, **values}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_transformers_writes(family: str, tmp_path: Path):
    import transformers

    name = FAMILIES[family].architectures[0].removesuffix("ForCausalLM")
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
        (
            config("gpt2"),
            "model_type 'gpt2' is not supported; supported are llama, mistral, qwen2, qwen3, phi3",
        ),
        ({}, "model_type is missing"),
        (config(architectures=["LlamaForSequenceClassification"]), "expected LlamaForCausalLM"),
        (config(hidden_act="relu"), "hidden_act 'relu' is not supported"),
        (
            config(quantization_config={"quant_method": "gptq"}),
            r"quantization_config \(quant_method 'gptq'\)",
        ),
        (config(rope_parameters={"rope_type": "spiral"}), "rope type 'spiral' is not supported"),
        (config(rope_parameters={"rope_type": "dynamic"}), "rope type 'dynamic' lacks factor"),
        (
            config(rope_scaling={"type": "linear", "factor": 0}),
            "factor of the rotary positions is 0; expected",
        ),
        (config("phi3", rope_scaling={"type": "su"}), "'longrope' lacks short_factor, long_factor"),
        (
            config("phi3", rope_scaling={"type": "su", "short_factor": [1.0], "long_factor": "2"}),
            "long_factor of the rotary scaling is not a list of numbers above 0",
        ),
        (
            config(rope_scaling={"rope_type": "llama3", "factor": 4}),
            "rope type 'llama3' lacks low_freq_factor",
        ),
        (
            config("qwen2", layer_types=["full_attention", "linear_attention"]),
            "layer_types linear_attention",
        ),
        (config("chatglm", **CHATGLM, rmsnorm=False), "rmsnorm False is not supported; expected True"),
        (config("chatglm", **CHATGLM, quantization_bit=4), "quantization_bit 4 is not supported"),
        (config("chatglm", **CHATGLM, pre_seq_len=128), "pre_seq_len 128 is not supported"),
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


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        (
            config("qwen2", use_sliding_window=True, sliding_window=32),
            ("window_layers", 32),
        ),
        (config("qwen3", use_sliding_window=True), ("window_layers", True)),
        (
            config("qwen2", layer_types=["full_attention", "sliding_attention"], sliding_window=8),
            ("window_layers", 8),
        ),
        (config("phi3", embd_pdrop=0.1), ("embd_pdrop", 0.1)),
        (
            config("chatglm", **CHATGLM, apply_residual_connection_post_layernorm=True),
            ("apply_residual_connection_post_layernorm", True),
        ),
    ],
)
def test_what_is_converted_but_not_built(values: dict[str, Any], feature: tuple[str, Any]):
    shape = shape_from_config(values)
    assert feature in shape.features
    name, value = feature
    with pytest.raises(
        Refused, match=rf"^{shape.family}: .*\({name} {str(value).lower()}\).*neither trained"
    ):
        refuse_unbuilt(shape)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
        ),
        # Without them the factor is what the longest row is by the original one, and that the model's own.
        (
            {"rope_type": "yarn", "original_max_position_embeddings": 32, "beta_fast": 16, "mscale": 0},
            RopeScaling(rope_type="yarn", factor=2.0, original_max_position_embeddings=32, beta_fast=16.0),
        ),
        (
            {"rope_type": "yarn", "factor": 2, "truncate": False, "attention_factor": 1.5},
            RopeScaling(
                rope_type="yarn",
                factor=2.0,
                original_max_position_embeddings=64,
                truncate=False,
                attention_factor=1.5,
            ),
        ),
    ],
)
def test_yarn_is_read_as_transformers_reads_it(scaling: dict[str, Any], expected: RopeScaling):
    import transformers
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    values = config("qwen2", rope_scaling=scaling, max_position_embeddings=64)
    shape = shape_from_config(values)
    assert shape.rope_scaling == expected and not shape.features
    rotary = {"rope_theta": 10000.0, "factor": None, **scaling}
    theirs = transformers.Qwen2Config(
        **{**SIZES, "max_position_embeddings": 64, "rope_parameters": {**rotary, "rope_type": "yarn"}}
    )
    embedding = Qwen2RotaryEmbedding(theirs)
    assert torch.equal(rotary_frequencies(shape), embedding.inv_freq)
    assert rotary_amplitude(shape.rope_scaling) == pytest.approx(embedding.attention_scaling, rel=1e-15)


LONGROPE = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 8.0, 9.0]}


@pytest.mark.parametrize(
    ("values", "scaling"),
    [
        (
            {"original_max_position_embeddings": 32},
            {"type": "su", "original_max_position_embeddings": 32},
        ),
        ({"original_max_position_embeddings": 32}, {"type": "yarn"}),
        ({"original_max_position_embeddings": 32}, {"rope_type": "longrope", "factor": 4.0}),
        ({"original_max_position_embeddings": 32}, {"rope_type": "longrope", "attention_factor": 1.5}),
        ({}, {"rope_type": "longrope", "original_max_position_embeddings": 32}),
        ({"max_position_embeddings": 8192}, {"rope_type": "longrope"}),
    ],
)
def test_longrope_is_read_as_transformers_reads_it(values: dict[str, Any], scaling: dict[str, Any]):
    import transformers
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    values = {**SIZES, "head_dim": 8, "hidden_size": 32, "num_attention_heads": 4, **values}
    scaling = {**scaling, **LONGROPE}
    shape = shape_from_config(config("phi3", **values, rope_scaling=dict(scaling)))
    theirs = Phi3RotaryEmbedding(transformers.Phi3Config(**values, rope_scaling=dict(scaling)))
    rotary = RotaryPositions(shape)
    assert (
        shape.rope_scaling is not None and shape.rope_scaling.rope_type == "longrope" and not shape.features
    )
    assert rotary.switch == theirs.config.rope_parameters["original_max_position_embeddings"]
    for length in (rotary.switch, rotary.switch + 1):
        positions = torch.arange(length)
        cos, sin = theirs(torch.zeros(1), positions.unsqueeze(0))
        tables = rotary.tables(positions, torch.float32)[:, :, 0, 0]
        torch.testing.assert_close(tables, torch.stack((cos[0, :, :4], sin[0, :, :4])), rtol=2e-7, atol=0)


def test_dynamic_rope_is_plain_within_the_models_positions():
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    shape = shape_from_config(config(rope_parameters=scaling))
    assert shape.rope_scaling == RopeScaling(rope_type="dynamic", factor=2.0) and not shape.features
    theirs = transformers.LlamaConfig(**SIZES, rope_parameters=scaling)
    frequencies, factor = ROPE_INIT_FUNCTIONS["dynamic"](
        theirs, "cpu", seq_len=SIZES["max_position_embeddings"]
    )
    assert factor == 1.0 and torch.allclose(rotary_frequencies(shape), frequencies, rtol=1e-6)


def test_gemma_ties_and_counts_from_1_by_default():
    shape = shape_from_config(config("gemma2", head_dim=16, query_pre_attn_scalar=16))
    assert not shape.untie_embeddings_and_output_weights and shape.post_norm
    assert {name for name, _ in shape.features} == {
        *("interleave_sliding_window", "gelu_tanh", "add_rmsnorm_offset", "input_embeds_norm"),
        *("attn_logit_softcapping", "output_logit_softcapping"),
    }
    assert shape_from_config(config("gemma", hidden_act="gelu")).kv_channels == 256


def test_windows_of_gemma2_are_in_every_second_layer_from_the_first_on():
    own = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5}
    told = config("gemma2", **own, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    for values in (config("gemma2", **own), told):
        assert [shape_from_config(values).window_of(layer) for layer in range(3)] == [5, None, 5]
    other = {**told, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
    with pytest.raises(Refused, match="other layers than every second one"):
        refuse_unbuilt(shape_from_config(other))


@pytest.mark.parametrize(
    ("activation", "feature"),
    [("silu", None), ("gelu", "geglu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_new", "gelu_tanh")],
)
def test_activations(activation: str, feature: str | None):
    shape = shape_from_config(config(hidden_act=activation))
    assert [name for name, _ in shape.features] == ([] if feature is None else [feature])
    refuse_unbuilt(shape)


def test_features_of_models_with_experts_are_not_built():
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    shape = shape_from_config(config("mixtral", hidden_act="gelu", **experts))
    with pytest.raises(Refused, match=r"^mixtral: a gated MLP with GELU \(geglu true\): not built"):
        refuse_unbuilt(shape)


def test_factors_of_minicpm_and_granite():
    factors = {"scale_emb": 12.0, "scale_depth": 1.5, "dim_model_base": 16.0}
    shape = shape_from_config(config("minicpm", **factors))
    assert dict(shape.features) == factors and not shape.untie_embeddings_and_output_weights
    with pytest.raises(Refused, match="config.json: scale_depth is missing"):
        shape_from_config(config("minicpm", **{**factors, "scale_depth": None}))
    assert not shape_from_config(config("granite", attention_multiplier=8**-0.5)).features
    own = {
        "embedding_multiplier": 12,
        "residual_multiplier": 0.25,
        "logits_scaling": 4,
        "attention_multiplier": 0.125,
    }
    assert dict(shape_from_config(config("granite", **own)).features) == {
        "query_pre_attn_scalar": 64.0,
        "scale_emb": 12.0,
        "scale_depth": 0.25 * 3**0.5,
        "dim_model_base": 16.0,
    }


def test_w_pack():
    check_w_pack(True, "baichuan")
    check_w_pack(True, "internlm2")
    check_w_pack(None, "llama")
    with pytest.raises(Refused, match="--w-pack contradicts the checkpoint, which is a llama model"):
        check_w_pack(True, "llama")


def test_aliases_of_the_published_scripts():
    for value, family in (
        *(("baichuan2", "baichuan"), ("chatglm3", "chatglm"), ("gemma", "gemma"), ("gemma2", "gemma2")),
        *(("internlm2", "internlm2"), ("glm4", "glm4"), ("phi3.5", "phi3"), ("llama2", "qwen3")),
    ):
        check_model_type_hf(value, family)
    with pytest.raises(Refused, match="--model-type-hf llama2 contradicts the checkpoint, which is a gemma2"):
        check_model_type_hf("llama2", "gemma2")


def test_model_type_hf():
    check_model_type_hf(None, "qwen3")
    check_model_type_hf("llama2", "qwen2")
    check_model_type_hf("qwen25", "qwen2")
    with pytest.raises(Refused, match="--model-type-hf mixtral contradicts the checkpoint, which is a llama"):
        check_model_type_hf("mixtral", "llama")
