"""The LoRA flags and the files of --lora-load, brought together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mindspeed_lora.adapters.inject_experts import check_expert_adapters
from mindspeed_lora.checkpoint.peft.plan import plan_adapter
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.config.shape import ModelShape, MoEShape
from mindspeed_lora.errors import Refused
from tests.support.adapters import new_adapter, random_factors, write

SHAPE = ModelShape(
    family="llama",
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=64,
    max_position_embeddings=32,
)
SEPARATE = ("q_proj", "k_proj", "v_proj", "down_proj")


def saved(folder: Path, *targets: str, **flags: Any) -> str:
    """A PEFT folder with rank 4, alpha 6 on these targets."""
    write(folder, SHAPE, new_adapter(SHAPE, 4, 6, lora_target_modules=targets, **flags))
    return str(folder)


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    return saved(tmp_path / "adapter", "linear_qkv", "linear_fc2")


def test_no_lora_flag_is_no_adapter() -> None:
    assert plan_adapter(LoraConfig(), SHAPE, 1) is None


def test_a_new_adapter_is_what_the_flags_say() -> None:
    lora = LoraConfig(
        lora_r=8, lora_alpha=12, lora_dropout=0.1, lora_target_modules=("linear_fc1", "linear_fc1")
    )
    plan = plan_adapter(lora, SHAPE, 7)
    assert plan is not None and plan.source is None and plan.seed == 7
    assert plan.spec.describe() == "r 8, alpha 12, on linear_fc1"
    assert plan.spec.dropout == 0.1 and plan.shared == {"linear_fc1"}


def test_the_files_tell_what_the_flags_leave_out(tmp_path: Path) -> None:
    path = saved(tmp_path, "linear_qkv", "linear_fc2", lora_dropout=0.2, use_rslora=True)
    plan = plan_adapter(LoraConfig(lora_load=path), SHAPE, 1)
    assert plan is not None and plan.source is not None
    assert plan.spec.describe() == "r 4, alpha 6, on linear_qkv linear_fc2"
    assert {part.scaling for part in plan.spec.parts} == {3.0} and plan.spec.dropout == 0.2


def test_another_dropout_is_no_contradiction(tmp_path: Path) -> None:
    path = saved(tmp_path, "linear_qkv", lora_dropout=0.2)
    plan = plan_adapter(LoraConfig(lora_load=path, lora_dropout=0.0), SHAPE, 1)
    assert plan is not None and plan.spec.dropout == 0.0


class TestOneFactorOrSeveral:
    def test_equal_a_stays_one(self, adapter: str) -> None:
        for targets in (None, ("linear_qkv", "linear_fc2")):
            plan = plan_adapter(LoraConfig(lora_load=adapter, lora_target_modules=targets), SHAPE, 1)
            assert plan is not None and plan.shared == {"linear_qkv"} and not plan.notices

    def test_names_of_matrices_keep_them_apart(self, adapter: str) -> None:
        plan = plan_adapter(LoraConfig(lora_load=adapter, lora_target_modules=SEPARATE), SHAPE, 1)
        assert plan is not None and not plan.shared and not plan.notices
        assert [part.label for part in plan.spec.parts] == ["q_proj", "k_proj", "v_proj", ""] * 2

    @pytest.mark.parametrize("targets", [None, ("linear_qkv", "linear_fc2")])
    def test_different_a_are_kept_with_one_notice(self, tmp_path: Path, targets: Any) -> None:
        path = saved(tmp_path, *SEPARATE)
        plan = plan_adapter(LoraConfig(lora_load=path, lora_target_modules=targets), SHAPE, 1)
        assert plan is not None and not plan.shared
        (notice,) = plan.notices
        assert "linear_qkv have no A in common; q_proj, k_proj, v_proj keep separate factors" in notice

    def test_one_layer_that_differs_is_enough(self, tmp_path: Path) -> None:
        new = new_adapter(SHAPE, lora_target_modules=("q_proj", "k_proj", "v_proj"))
        factors = random_factors(new)
        for layer in range(2):
            module = f"decoder.layers.{layer}.self_attention.linear_qkv"
            for name in ("k_proj", "v_proj"):
                factors[f"{module}.{name}.lora_a"] = factors[f"{module}.q_proj.lora_a"]
        write(tmp_path / "equal", SHAPE, new, factors)
        plan = plan_adapter(LoraConfig(lora_load=str(tmp_path / "equal")), SHAPE, 1)
        assert plan is not None and plan.shared == {"linear_qkv"}
        last = "decoder.layers.1.self_attention.linear_qkv.v_proj.lora_a"
        factors[last] = factors[last] * 2
        write(tmp_path / "differ", SHAPE, new, factors)
        plan = plan_adapter(LoraConfig(lora_load=str(tmp_path / "differ")), SHAPE, 1)
        assert plan is not None and not plan.shared

    def test_a_run_goes_on_as_it_was(self, adapter: str) -> None:
        plan = plan_adapter(LoraConfig(lora_load=adapter), SHAPE, 1, shared=[])
        assert plan is not None and not plan.shared and not plan.notices


def test_equal_flags_are_no_contradiction(tmp_path: Path) -> None:
    flags: dict[str, Any] = {
        "lora_target_modules": ("linear_fc2", "q_proj", "v_proj"),
        "lora_rank_pattern": {"linear_fc2": 2},
        "lora_alpha_pattern": {"v_proj": 3.0},
        "lora_layers_to_transform": (1,),
        "lora_exclude_modules": ("v_proj",),
        "use_rslora": True,
        "lora_modules_to_save": ("output_layer", "norm"),
    }
    flags["lora_alpha_pattern"] = {"q_proj": 3.0}
    write(tmp_path, SHAPE, new_adapter(SHAPE, 4, 6, **flags))
    lora = LoraConfig(lora_load=str(tmp_path), lora_r=4, lora_alpha=6, **flags)
    plan = plan_adapter(lora, SHAPE, 1)
    assert plan is not None
    assert [(part.name, part.rank, part.alpha) for part in plan.spec.parts] == [
        ("decoder.layers.1.self_attention.linear_qkv.q_proj", 4, 3.0),
        ("decoder.layers.1.mlp.linear_fc2", 2, 6),
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lora_r": 8}, "--lora-r 8 (the adapter has 4)"),
        ({"lora_alpha": 8}, "--lora-alpha 8 (the adapter has 6)"),
        ({"use_rslora": True}, "--use-rslora (the adapter's scaling is alpha / r)"),
        (
            {"lora_target_modules": ("linear_qkv",)},
            "--lora-target-modules linear_qkv (the adapter is on q_proj ",
        ),
        ({"lora_exclude_modules": ("v_proj",)}, "--lora-exclude-modules v_proj (the adapter has None)"),
        ({"lora_layers_to_transform": (0,)}, "--lora-layers-to-transform 0 (the adapter has none)"),
        ({"lora_bias": "all"}, "--lora-bias all (the adapter has none)"),
        (
            {"lora_modules_to_save": ("output_layer",)},
            "--lora-modules-to-save output_layer (the adapter has none)",
        ),
        ({"lora_ensure_weight_tying": True}, "--lora-ensure-weight-tying (the adapter is without)"),
        ({"lora_rank_pattern": {"q_proj": 2}}, "--lora-rank-pattern {'q_proj': 2} (the adapter has {})"),
        (
            {"lora_alpha_pattern": {"q_proj": 2.0}},
            "--lora-alpha-pattern {'q_proj': 2.0} (the adapter has {})",
        ),
    ],
)
def test_a_contradicting_flag_is_refused_with_both_values(
    adapter: str, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(Refused) as error:
        plan_adapter(LoraConfig(lora_load=adapter, **given), SHAPE, 1)
    assert words in str(error.value) and f"contradicting {adapter}" in str(error.value)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"lora_exclude_modules": (r".*experts\.1\.w2",)}, "expert 1 no adapter"),
        ({"lora_rank_pattern": {r".*experts\.2\.w2": 8}}, "expert 2 r 8 with scaling 1 on linear_fc2"),
    ],
)
def test_experts_of_a_layer_have_equal_adapters(flags: dict[str, Any], told: str) -> None:
    shape = dataclasses.replace(
        SHAPE, family="mixtral", moe=MoEShape(num_experts=3, topk=2, ffn_hidden_size=8)
    )
    lora = LoraConfig(lora_r=4, lora_alpha=8, lora_target_modules=("linear_qkv", "linear_fc2"))
    even, uneven = plan_adapter(lora, shape, 1), plan_adapter(dataclasses.replace(lora, **flags), shape, 1)
    assert even is not None and uneven is not None
    check_expert_adapters(even.spec, shape)
    with pytest.raises(Refused, match=f"expert 0 has r 4 .* and {told}; .*one grouped product"):
        check_expert_adapters(uneven.spec, shape)
