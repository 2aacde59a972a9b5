"""DeepSeek's config.json: what transformers writes, what it takes when a key is missing, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mindspeed_lora.checkpoint.canonical import canonical_tensors
from mindspeed_lora.config.model_features import refuse_unbuilt
from mindspeed_lora.config.shape import MLAShape, ModelShape, MoEShape, RopeScaling
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES, check_model_type_hf, shape_from_config

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "n_routed_experts": 16,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 4,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
}
MLA = MLAShape(q_lora_rank=28, kv_lora_rank=20, qk_head_dim=12, qk_pos_emb_head_dim=6, v_head_dim=10)
V3_EXPERTS: dict[str, Any] = {
    "num_experts": 16,
    "topk": 4,
    "ffn_hidden_size": 24,
    "shared_ffn_hidden_size": 24,
    "score_function": "sigmoid",
    "scaling_factor": 2.5,
    "expert_bias": True,
    "group_score": "top2",
}
V2_EXPERTS: dict[str, Any] = {
    "num_experts": 16,
    "topk": 4,
    "ffn_hidden_size": 24,
    "shared_ffn_hidden_size": 48,
    "normalise": False,
}
CASES: dict[str, tuple[str, dict[str, Any], MoEShape]] = {
    "v3": (
        "deepseek_v3",
        {"n_group": 4, "topk_group": 2, "num_key_value_heads": 8},
        MoEShape(**V3_EXPERTS, dense_layers=(0, 1, 2), num_groups=4, group_topk=2),
    ),
    "v3, not divided": (
        "deepseek_v3",
        {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "first_k_dense_replace": 1},
        MoEShape(**V3_EXPERTS, dense_layers=(0,), normalise=False),
    ),
    "v2": (
        "deepseek_v2",
        {
            "topk_method": "group_limited_greedy",
            "n_group": 8,
            "topk_group": 3,
            "routed_scaling_factor": 16.0,
            "first_k_dense_replace": 1,
        },
        MoEShape(**V2_EXPERTS, dense_layers=(0,), num_groups=8, group_topk=3, scaling_factor=16.0),
    ),
    "v2 lite": (
        "deepseek_v2",
        # Groups are told and play no part.
        {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
        MoEShape(**{**V2_EXPERTS, "shared_ffn_hidden_size": 24}),
    ),
}


def config(family: str, **values: Any) -> dict[str, Any]:
    return {"model_type": family, **SIZES, **values}


def of_transformers(family: str, values: dict[str, Any]) -> Any:
    name = FAMILIES[family].architectures[0].removesuffix("ForCausalLM")
    return getattr(transformers, f"{name}Config")(**{**SIZES, **values})


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_given_is_what_transformers_takes(case: str, tmp_path: Path) -> None:
    """The keys alone, and the file in which transformers writes every key, mean the same model."""
    family, values, experts = CASES[case]
    shape = shape_from_config(config(family, **values))
    assert shape.moe == experts
    assert shape.mla is not None and shape.mla.q_lora_rank == values.get("q_lora_rank", 28)
    assert (shape.kv_channels, shape.num_query_groups, shape.proj_input_size) == (18, 8, 80)
    of_transformers(family, values).save_pretrained(tmp_path)
    assert shape_from_config(json.loads((tmp_path / "config.json").read_text())) == shape
    refuse_unbuilt(shape)


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_those_of_transformers(case: str) -> None:
    """Names and shapes of all but the experts, which lie stacked in its modules."""
    family, values, _ = CASES[case]
    shape = shape_from_config(config(family, **values))
    name = FAMILIES[family].architectures[0]
    with torch.device("meta"):
        model = getattr(transformers, name)(of_transformers(family, values))
    expected = {name: tuple(t.shape) for name, t in (*model.named_parameters(), *model.named_buffers())}
    found: dict[str, tuple[int, ...]] = {}
    for canonical, size in canonical_tensors(shape).items():
        if ".local_experts." not in canonical:
            mapping, layer = FAMILIES[family].mapping(canonical)
            found.update(zip(mapping.names(layer), mapping.hf_shapes(shape, size), strict=True))
    with_experts = {name for name in expected if ".experts." in name or "inv_freq" in name}
    assert found == {name: size for name, size in expected.items() if name not in with_experts}


def test_published_deepseek_v3() -> None:
    published = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "v_head_dim": 128,
        "vocab_size": 129280,
    }
    shape = shape_from_config(published)
    assert shape.mla == MLAShape(
        q_lora_rank=1536, kv_lora_rank=512, qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128
    )
    assert shape.moe == MoEShape(
        num_experts=256,
        topk=8,
        ffn_hidden_size=2048,
        dense_layers=(0, 1, 2),
        shared_ffn_hidden_size=2048,
        score_function="sigmoid",
        scaling_factor=2.5,
        expert_bias=True,
        num_groups=8,
        group_topk=4,
        group_score="top2",
    )
    assert shape.rope_scaling == RopeScaling(
        rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
    )
    with pytest.raises(Refused, match="quant_method 'fp8'"):
        shape_from_config({**published, "quantization_config": {"quant_method": "fp8"}})


def shape_of(family: str, **values: Any) -> ModelShape:
    return shape_from_config(config(family, **values))


def test_layers_between_which_experts_stand() -> None:
    moe = shape_of("deepseek_v2", first_k_dense_replace=1, moe_layer_freq=2).moe
    assert moe is not None and moe.dense_layers == (0, 1, 3)
    assert shape_of("deepseek_v3", first_k_dense_replace=4).moe is None


@pytest.mark.parametrize(
    ("family", "values", "words"),
    [
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob true is not supported; expected false"),
        (
            "deepseek_v2",
            {"topk_method": "noaux_tc"},
            "topk_method noaux_tc .* greedy or group_limited_greedy",
        ),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias true is not supported"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias true is not supported"),
        (
            "deepseek_v3",
            {"scoring_func": "softmax"},
            "scoring_func softmax is not supported; expected sigmoid",
        ),
        ("deepseek_v3", {"first_k_dense_replace": 0, "n_group": 3}, "n_group 3"),
        ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ("deepseek_v3", {"n_routed_experts": None}, "n_routed_experts is missing"),
    ],
)
def test_refused(family: str, values: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused, match=f"config.json: .*{words}"):
        shape_of(family, **values)


def test_names_in_peoples_scripts() -> None:
    check_model_type_hf("deepseek3", "deepseek_v3")
    for name in ("deepseek2", "deepseek2-lite"):
        check_model_type_hf(name, "deepseek_v2")
    with pytest.raises(Refused):
        check_model_type_hf("deepseek2", "deepseek_v3")
