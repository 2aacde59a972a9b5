"""config.json of the families with experts: what transformers writes, what it takes when a key is missing, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_lora.config.model_features import refuse_unbuilt
from mindspeed_lora.config.shape import ModelShape, MoEShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES, check_model_type_hf, shape_from_config

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
QWEN2 = {"num_experts": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 48}
QWEN3 = {"num_experts": 16, "moe_intermediate_size": 16}
GLM = {"n_routed_experts": 16, "moe_intermediate_size": 16, "n_shared_experts": 2}
MIXTRAL = {"num_local_experts": 8}
CASES: dict[str, tuple[str, dict[str, Any], MoEShape]] = {
    "mixtral": (
        "mixtral",
        MIXTRAL,
        MoEShape(num_experts=8, topk=2, ffn_hidden_size=96, aux_loss_coeff=0.001),
    ),
    "qwen2_moe": (
        "qwen2_moe",
        QWEN2,
        MoEShape(
            num_experts=8,
            topk=4,
            ffn_hidden_size=16,
            shared_ffn_hidden_size=48,
            shared_expert_gate=True,
            normalise=False,
            aux_loss_coeff=0.001,
        ),
    ),
    "qwen2_moe with dense layers": (
        "qwen2_moe",
        {**QWEN2, "decoder_sparse_step": 2, "mlp_only_layers": [3], "num_experts_per_tok": 3},
        MoEShape(
            num_experts=8,
            topk=3,
            ffn_hidden_size=16,
            dense_layers=(0, 2, 3),
            shared_ffn_hidden_size=48,
            shared_expert_gate=True,
            normalise=False,
            aux_loss_coeff=0.001,
        ),
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {**QWEN3, "norm_topk_prob": True, "router_aux_loss_coef": 0.0},
        MoEShape(num_experts=16, topk=8, ffn_hidden_size=16),
    ),
    "glm4_moe": (
        "glm4_moe",
        {**GLM, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
        MoEShape(
            num_experts=16,
            topk=8,
            ffn_hidden_size=16,
            dense_layers=(0,),
            shared_ffn_hidden_size=32,
            score_function="sigmoid",
            scaling_factor=2.5,
            expert_bias=True,
            num_groups=4,
            group_topk=2,
            group_score="top2",
        ),
    ),
}


def config(family: str, **values: Any) -> dict[str, Any]:
    return {"model_type": family, **SIZES, **values}


def of_transformers(family: str, folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The config.json that transformers writes for the same values."""
    import transformers

    name = FAMILIES[family].architectures[0].removesuffix("ForCausalLM")
    getattr(transformers, f"{name}Config")(**SIZES, **values).save_pretrained(folder)
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_given_is_what_transformers_takes(case: str, tmp_path: Path):
    """The keys alone, and the file in which transformers writes every key, mean the same model."""
    family, values, expected = CASES[case]
    shape = shape_from_config(config(family, **values))
    assert shape.moe == expected
    assert shape_from_config(of_transformers(family, tmp_path, values)) == shape
    assert shape.qk_layernorm == (family == "qwen3_moe")
    assert shape.add_qkv_bias == (family == "qwen2_moe") and not shape.add_proj_bias
    assert shape.num_query_groups == {"mixtral": 8, "qwen2_moe": 16, "qwen3_moe": 4, "glm4_moe": 8}[family]
    assert shape.kv_channels == 4 and shape.untie_embeddings_and_output_weights


def reference_block(shape: ModelShape, family: str, values: dict[str, Any], layer: int) -> torch.nn.Module:
    import transformers

    name = FAMILIES[family].architectures[0].removesuffix("ForCausalLM")
    made = getattr(transformers, f"{name}Config")(**SIZES, **values)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(made)
    return model.model.layers[layer]


@pytest.mark.parametrize("case", CASES)
def test_layers_are_those_of_transformers(case: str):
    """Which layers have experts, and their widths, in the modules that transformers builds."""
    family, values, _ = CASES[case]
    values = {**values, "num_key_value_heads": 4}
    shape = shape_from_config(config(family, **values))
    assert shape.moe is not None
    for layer in range(shape.num_layers):
        sizes = {
            name: tuple(one.shape)
            for name, one in reference_block(shape, family, values, layer).named_parameters()
        }
        assert shape.has_experts(layer) == ("mlp.experts.down_proj" in sizes)
        if shape.has_experts(layer):
            width = shape.moe.ffn_hidden_size
            assert sizes["mlp.experts.down_proj"] == (shape.moe.num_experts, 64, width)
            shared = [
                size for name, size in sizes.items() if ".shared_expert" in name and "down_proj" in name
            ]
            assert shared == (
                [(64, shape.moe.shared_ffn_hidden_size)] if shape.moe.shared_ffn_hidden_size else []
            )
        else:
            assert sizes["mlp.down_proj.weight"] == (64, shape.ffn_hidden_size)
        assert ("self_attn.q_proj.bias" in sizes) == shape.add_qkv_bias
        assert ("self_attn.o_proj.bias" in sizes) == shape.add_proj_bias


def test_published_qwen3_30b_a3b():
    shape = shape_from_config(
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": 151936,
        }
    )
    assert shape.moe == MoEShape(num_experts=128, topk=8, ffn_hidden_size=768, aux_loss_coeff=0.001)
    assert (shape.kv_channels, shape.rotary_base, shape.sliding_window) == (128, 1e6, None)
    assert shape.features == ()


def test_defaults_of_positions_and_norms():
    mixtral = shape_from_config(config("mixtral", **MIXTRAL))
    assert (mixtral.rotary_base, mixtral.norm_epsilon, mixtral.sliding_window) == (1e6, 1e-5, None)
    window = shape_from_config(config("mixtral", **MIXTRAL, sliding_window=16))
    assert window.sliding_window == 16
    glm = shape_from_config(config("glm4_moe", **GLM))
    assert (glm.rotary_base, glm.norm_epsilon) == (1e4, 1e-5)
    every = shape_from_config(config("qwen3_moe", **QWEN3, use_sliding_window=True, sliding_window=16))
    assert every.sliding_window == 16 and every.features == ()
    none = shape_from_config(config("qwen3_moe", **QWEN3, use_sliding_window=False, sliding_window=16))
    assert none.sliding_window is None


@pytest.mark.parametrize(
    ("family", "values", "words"),
    [
        ("mixtral", {**MIXTRAL, "router_jitter_noise": 0.1}, "moe_input_jitter_eps 0.1"),
        (
            "qwen2_moe",
            {**QWEN2, "use_sliding_window": True, "sliding_window": 16},
            "window_layers 16",
        ),
    ],
)
def test_what_is_not_built_is_named(family: str, values: dict[str, Any], words: str):
    with pytest.raises(Refused, match=words):
        refuse_unbuilt(shape_from_config(config(family, **values)))


@pytest.mark.parametrize(
    ("family", "values", "words"),
    [
        ("mixtral", {"num_local_experts": None}, "num_local_experts or num_experts is missing"),
        ("mixtral", {**MIXTRAL, "num_experts_per_tok": 9}, "num_experts_per_tok 9 of 8 experts"),
        ("qwen2_moe", {**QWEN2, "shared_expert_intermediate_size": None}, "shared_expert_intermediate_size"),
        ("qwen3_moe", {**QWEN3, "decoder_sparse_step": 0}, "decoder_sparse_step 0"),
        ("glm4_moe", {**GLM, "n_group": 3}, "n_group 3"),
        ("glm4_moe", {**GLM, "n_group": 8, "topk_group": 2}, "topk_group 2"),
    ],
)
def test_refused(family: str, values: dict[str, Any], words: str):
    with pytest.raises(Refused, match=words):
        shape_from_config(config(family, **values))


def test_names_in_peoples_scripts():
    for name, family in {
        "mixtral": "mixtral",
        "qwen2-moe": "qwen2_moe",
        "qwen3-moe": "qwen3_moe",
        "glm45-moe": "glm4_moe",
        "glm45": "glm4_moe",
    }.items():
        check_model_type_hf(name, family)
    with pytest.raises(Refused):
        check_model_type_hf("mixtral", "qwen3_moe")
