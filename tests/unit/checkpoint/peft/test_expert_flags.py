"""What the LoRA flags mean on a model with experts, and that their cost grows with the model alone."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import Any

import pytest

from mindspeed_lora.adapters.spec import AdapterSpec
from mindspeed_lora.checkpoint.canonical import tensor_rule
from mindspeed_lora.checkpoint.peft.chosen_names import pattern_of, places, shortest_names
from mindspeed_lora.checkpoint.peft.config import AdapterConfig
from mindspeed_lora.checkpoint.peft.contradictions import refuse_contradictions
from mindspeed_lora.checkpoint.peft.description import describe_adapter, hf_linears
from mindspeed_lora.checkpoint.peft.flags import config_from_flags
from mindspeed_lora.checkpoint.peft.rules import Patterns, matcher, pattern_key
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.config.shape import MLAShape, ModelShape, MoEShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES

MOE = MoEShape(num_experts=3, topk=2, ffn_hidden_size=8, dense_layers=(0,), shared_ffn_hidden_size=12)
SHAPE = ModelShape(
    family="glm4_moe",
    num_layers=3,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=64,
    max_position_embeddings=32,
    moe=MOE,
)
MLA = MLAShape(q_lora_rank=28, kv_lora_rank=20, qk_head_dim=12, qk_pos_emb_head_dim=6, v_head_dim=10)
QWEN3_30B = ModelShape(
    family="qwen3_moe",
    num_layers=48,
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_attention_heads=32,
    num_query_groups=4,
    kv_channels=128,
    vocab_size=151_936,
    max_position_embeddings=40_960,
    qk_layernorm=True,
    moe=MoEShape(num_experts=128, topk=8, ffn_hidden_size=768),
)
FOUR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def described(*targets: str, shape: ModelShape = SHAPE, **others: Any) -> tuple[AdapterConfig, AdapterSpec]:
    lora = LoraConfig(lora_r=4, lora_alpha=8, lora_target_modules=targets, **others)
    config, shared = config_from_flags(lora, shape)
    return config, describe_adapter(config, shape, shared, lora.lora_moe_shared)


def kinds(*targets: str, **others: Any) -> list[str]:
    """Parts' names without layer and expert, each once."""
    _, spec = described(*targets, **others)
    names = (re.sub(r"decoder\.layers\.\d+\.|local_experts\.\d+\.", "", part.name) for part in spec.parts)
    return list(dict.fromkeys(names))


class TestNames:
    @pytest.mark.parametrize("form", ["fused", "per-expert"])
    @pytest.mark.parametrize(
        ("target", "expected"),
        [
            ("linear_fc2", ["mlp.linear_fc2", "mlp.experts.linear_fc2", "mlp.shared_experts.linear_fc2"]),
            ("mlp.linear_fc2", ["mlp.linear_fc2"]),
            ("experts.linear_fc1", ["mlp.experts.linear_fc1"]),
            ("shared_experts.linear_fc1", ["mlp.shared_experts.linear_fc1"]),
            ("experts.gate_up_proj", ["mlp.experts.linear_fc1"]),
            ("router", ["mlp.router"]),
            ("gate", ["mlp.router"]),
            (r"decoder\.layers\.1\.mlp\.shared.*", [f"mlp.shared_experts.linear_fc{n}" for n in (1, 2)]),
        ],
    )
    def test_of_megatron(self, target: str, expected: list[str], form: str):
        assert kinds(target, peft_moe_format=form) == expected

    def test_of_hugging_face(self):
        assert kinds("experts.up_proj", "experts.gate_proj", "shared_experts.down_proj") == [
            "mlp.experts.linear_fc1.gate_proj",
            "mlp.experts.linear_fc1.up_proj",
            "mlp.shared_experts.linear_fc2",
        ]
        assert len(described("experts.2.down_proj", peft_moe_format="per-expert")[1].parts) == 2

    @pytest.mark.parametrize("family", sorted(FAMILIES))
    def test_every_family_has_a_rule_for_each_matrix(self, family: str):
        """Also where the matrices of ``linear_fc1`` are not called ``…_proj``: Mixtral's and InternLM2's w1 and w3."""
        of_experts = any("experts" in row.canonical for row in FAMILIES[family].table)
        moe = MoEShape(num_experts=3, topk=2, ffn_hidden_size=8) if of_experts else None
        latent = MLA if family.startswith("deepseek") else None
        shape = dataclasses.replace(SHAPE, family=family, moe=moe, mla=latent)
        _, spec = described("all-linear", shape=shape)
        assert spec.parts and all(tensor_rule(name) for part in spec.parts for name in part.tensors)

    def test_the_router_stays_frozen_unless_it_is_named(self):
        assert "mlp.router" not in kinds("all-linear") and "mlp.router" not in kinds(*FOUR)
        config, _ = described("all-linear", peft_moe_format="per-expert")
        assert config.target_modules != "all-linear" and not config.targets("model.layers.1.mlp.gate")

    def test_each_place_shares_by_itself(self):
        """gate and up of the experts share one A where those of the shared experts have their own."""
        assert kinds("experts.linear_fc1", "shared_experts.gate_proj") == [
            "mlp.experts.linear_fc1",
            "mlp.shared_experts.linear_fc1.gate_proj",
        ]
        with pytest.raises(Refused, match=r"experts\.linear_fc1 is one adapter for gate_proj, up_proj"):
            described("experts.linear_fc1", "experts.gate_proj")

    def test_layers_exclusions_and_patterns(self):
        config, spec = described(
            "linear_fc2",
            lora_layers_to_transform=(1,),
            lora_exclude_modules=("shared_experts.linear_fc2",),
            lora_rank_pattern={"experts.linear_fc2": 6},
        )
        assert {part.module.split(".")[4] for part in spec.parts} == {"experts"}
        assert {part.rank for part in spec.parts} == {6} and len(spec.parts) == 3
        assert config.target_parameters == ("model.layers.1.mlp.experts.down_proj",)

    def test_people_s_names_on_latent_attention_are_refused_on_others(self):
        with pytest.raises(Refused, match="has no module linear_q"):
            described("linear_q")


def test_shared_factors_are_cut_as_one_expert_s():
    _, spec = described("experts.linear_fc1", "experts.down_proj", lora_moe_shared=True)
    first = [part for part in spec.parts if part.module.startswith("decoder.layers.1.")]
    assert {name: (size, tensor_rule(name).axis, tensor_rule(name).blocks) for part in first
            for name, size in part.tensors.items()} == {
        "decoder.layers.1.mlp.experts.linear_fc1.lora_a": ((4, 16), None, 1),
        "decoder.layers.1.mlp.experts.linear_fc1.lora_b": ((16, 4), 0, 2),
        "decoder.layers.1.mlp.experts.linear_fc2.lora_a": ((4, 8), 1, 1),
        "decoder.layers.1.mlp.experts.linear_fc2.lora_b": ((16, 4), None, 1),
    }  # fmt: skip
    assert first[0].hf_modules[:3] == tuple(
        f"model.layers.1.mlp.experts.{name}" for name in ("0.gate_proj", "0.up_proj", "1.gate_proj")
    )


def test_names_and_patterns_mean_the_chosen_alone():
    everything = [name for names in hf_linears(SHAPE).values() for name in names]
    for chosen in (
        [name for name in everything if "experts.1." in name],
        [name for name in everything if name.startswith("model.layers.1.")],
        [name for name in everything if name.endswith("gate_proj")],
        [name for name in everything if ".shared_experts." in name or name.endswith("o_proj")],
    ):
        assert [name for name in everything if matcher(shortest_names(chosen, everything))(name)] == chosen
        assert [name for name in everything if matcher(places(chosen, everything))(name)] == chosen
        pattern = pattern_of(dict.fromkeys(chosen, 7), 4, everything)
        assert [name for name in everything if Patterns(pattern).key(name)] == chosen


def test_patterns_find_what_peft_s_rule_finds():
    keys = [
        "gate_proj",
        "experts.1.up_proj",
        "layers.2.mlp.gate",
        r".*\.1\..*down_proj",
        "mlp.gate_pr.j",
        "x.y",
        "o_proj",
    ]
    names = [
        *(name for names in hf_linears(SHAPE).values() for name in names),
        "xay",
        "x.y",
        "o_proj",
        "no_proj",
    ]
    for first in range(len(keys)):
        order = keys[first:] + keys[:first]
        assert [Patterns(order).key(name) for name in names] == [pattern_key(order, name) for name in names]


def calls(shape: ModelShape, **others: Any) -> int:
    """Function calls, Python's and C's, of making and checking an adapter's description."""
    count = 0

    def counted(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    lora = LoraConfig(lora_r=4, lora_alpha=8, **others)
    sys.setprofile(counted)
    try:
        config, shared = config_from_flags(lora, shape)
        spec = describe_adapter(config, shape, shared)
        modules = [name for part in spec.parts for name in part.hf_modules]
        refuse_contradictions(lora, config, modules, shape)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("form", ["fused", "per-expert"])
@pytest.mark.parametrize(
    "others",
    [
        {"lora_target_modules": FOUR, "lora_rank_pattern": {"linear_fc2": 2}},
        {
            "lora_target_modules": (r"decoder\.layers\..*[13579]\..*experts.*", "q_proj"),
            "lora_exclude_modules": (r"decoder\.layers\.3\..*",),
            "lora_alpha_pattern": {r"decoder\.layers\.5\..*": 4},
            "lora_modules_to_save": ("router", "norm"),
        },
    ],
    ids=["names", "expressions"],
)
def test_work_grows_with_the_number_of_experts(form: str, others: dict[str, Any]):
    """Twice the experts, at most twice the calls: nothing compares each name with each other."""

    def shape(experts: int) -> ModelShape:
        moe = dataclasses.replace(MOE, num_experts=experts)
        return dataclasses.replace(SHAPE, num_layers=10, moe=moe)

    described(*FOUR, shape=shape(32))  # what is kept between calls is there
    few, many = (calls(shape(experts), peft_moe_format=form, **others) for experts in (16, 32))
    assert many < 2.05 * few


def test_qwen3_30b_with_an_adapter_on_every_expert():
    for form, named in (("fused", 4 + 2), ("per-expert", 7)):
        config, spec = described(*FOUR, shape=QWEN3_30B, peft_moe_format=form)
        assert len(spec.parts) == 48 * (2 + 2 * 128)
        assert len(config.target_modules) + len(config.target_parameters) == named
