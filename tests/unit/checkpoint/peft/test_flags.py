"""What the LoRA flags mean on a model, in PEFT's form; PEFT itself is the judge of that form."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.checkpoint.peft.description import describe_adapter
from mindspeed_lora.checkpoint.peft.flags import config_from_flags
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.config.shape import MLAShape, ModelShape
from mindspeed_lora.errors import Refused

SHAPE = ModelShape(
    family="llama",
    num_layers=3,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=64,
    max_position_embeddings=32,
)
ALL_HF = tuple(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))


def flags(*targets: str, **others: Any) -> LoraConfig:
    return LoraConfig(lora_r=4, lora_alpha=8, lora_target_modules=targets or ("linear_qkv",), **others)


def parts(*targets: str, **others: Any) -> list[str]:
    """Canonical names of the pairs of factors, without ``decoder.layers.``."""
    config, shared = config_from_flags(flags(*targets, **others), SHAPE)
    found = describe_adapter(config, SHAPE, shared).parts
    return [part.name.removeprefix("decoder.layers.") for part in found]


def form(*targets: str, **others: Any) -> Any:
    return config_from_flags(flags(*targets, **others), SHAPE)[0].target_modules


class TestTargets:
    def test_megatron_names_are_one_pair_a_linear(self) -> None:
        assert parts("linear_qkv", "mlp.linear_fc1")[:3] == [
            "0.self_attention.linear_qkv",
            "0.mlp.linear_fc1",
            "1.self_attention.linear_qkv",
        ]
        assert form("linear_fc1", "linear_qkv") == ("gate_proj", "up_proj", "q_proj", "k_proj", "v_proj")

    def test_hugging_face_names_are_a_pair_each(self) -> None:
        assert parts("v_proj", "q_proj", "o_proj")[:3] == [
            "0.self_attention.linear_qkv.q_proj",
            "0.self_attention.linear_qkv.v_proj",
            "0.self_attention.linear_proj",
        ]
        assert form("v_proj", "self_attn.q_proj") == ("v_proj", "self_attn.q_proj")

    def test_all_linear(self) -> None:
        assert len(parts("all-linear")) == 3 * 7
        assert form("all-linear") == form("All-Linear") == form("q_proj", "all-linear") == "all-linear"

    def test_both_kinds_of_names(self) -> None:
        assert parts("linear_qkv", "up_proj", "down_proj", "linear_proj", "o_proj")[:4] == [
            "0.self_attention.linear_qkv",
            "0.self_attention.linear_proj",
            "0.mlp.linear_fc1.up_proj",
            "0.mlp.linear_fc2",
        ]

    def test_an_expression_over_canonical_names(self) -> None:
        expression = r"decoder\.layers\.[02]\.self_attention\..*"
        assert parts(expression) == [
            f"{layer}.self_attention.{linear}" for layer in (0, 2) for linear in ("linear_qkv", "linear_proj")
        ]
        assert form(expression)[:2] == ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
        assert form(r"decoder\.layers\.\d+\.mlp\.linear_fc2") == ("down_proj",)

    def test_an_expression_over_hugging_face_names_is_kept(self) -> None:
        expression = r".*layers\.1\..*\.(q|v)_proj"
        assert parts(expression) == [f"1.self_attention.linear_qkv.{name}_proj" for name in "qv"]
        assert form(expression) == expression
        assert form(expression, "down_proj") == (
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.self_attn.v_proj",
            "down_proj",
        )

    def test_one_name_in_full(self) -> None:
        assert parts("model.layers.1.mlp.up_proj") == ["1.mlp.linear_fc1.up_proj"]
        assert parts("decoder.layers.2.mlp.linear_fc2") == ["2.mlp.linear_fc2"]

    @pytest.mark.parametrize("name", ["lm_head", "output_layer", "model.embed_tokens"])
    def test_the_vocabulary_s_modules_are_there_and_get_none(self, name: str) -> None:
        with pytest.raises(Refused, match=f"{name} gets no factors, .* whole by --lora-modules-to-save"):
            parts("linear_qkv", name)

    @pytest.mark.parametrize("name", ["linear_kqv", "self_attention", "proj", "", "q_proj|x"])
    def test_what_means_nothing_is_refused_with_what_there_is(self, name: str) -> None:
        with pytest.raises(Refused) as error:
            parts("linear_qkv", name)
        assert f"--lora-target-modules: the model has no module {name};" in str(error.value)
        assert "linear_fc1, linear_fc2, linear_proj, linear_qkv by Megatron's names" in str(error.value)
        assert "q_proj, k_proj" in str(error.value)

    def test_what_is_neither_name_nor_expression(self) -> None:
        with pytest.raises(Refused, match=r"'\(' is no regular expression"):
            parts("(")

    @pytest.mark.parametrize(
        "names", [("linear_qkv", "q_proj"), ("all-linear", "linear_fc1"), ("up_proj", "linear_fc1")]
    )
    def test_one_matrix_in_two_ways(self, names: tuple[str, ...]) -> None:
        with pytest.raises(Refused, match="is one adapter for .* one for itself; name either"):
            parts(*names)


class TestLayersAndExclusions:
    def test_layers(self) -> None:
        assert parts("q_proj", lora_layers_to_transform=(2, 0)) == [
            "0.self_attention.linear_qkv.q_proj",
            "2.self_attention.linear_qkv.q_proj",
        ]
        assert parts("linear_qkv", lora_layers_to_transform=(1,), lora_layers_pattern=("layers",)) == [
            "1.self_attention.linear_qkv"
        ]

    @pytest.mark.parametrize(
        ("others", "words"),
        [
            ({"lora_layers_to_transform": (3,)}, "3: the model has the layers 0 to 2"),
            ({"lora_layers_to_transform": (1,), "lora_layers_pattern": ("h",)}, "leave no module"),
            ({"lora_layers_to_transform": (1,), "lora_layers_pattern": ("(",)}, "no regular expression"),
            ({"lora_layers_pattern": ("layers",)}, "says nothing without --lora-layers-to-transform"),
            ({"lora_exclude_modules": ("linear_qkv",)}, "leave no module"),
            ({"lora_exclude_modules": ("down_proj",)}, "none of it is named by --lora-target-modules"),
            ({"lora_exclude_modules": ("x_proj",)}, "--lora-exclude-modules: the model has no module x_proj"),
            (
                {"lora_exclude_modules": ("k_proj",)},
                "k_proj is left out of it; name the ones .*q_proj v_proj",
            ),
        ],
    )
    def test_what_is_refused(self, others: dict[str, Any], words: str) -> None:
        with pytest.raises(Refused, match=words):
            parts("linear_qkv", **others)

    @pytest.mark.parametrize("target", ["all-linear", r".*\.q_proj", "model.layers.1.mlp.up_proj"])
    def test_layers_go_with_short_names_alone(self, target: str) -> None:
        with pytest.raises(Refused, match="--lora-layers-to-transform goes with names like"):
            parts(target, lora_layers_to_transform=(1,))

    def test_exclusions(self) -> None:
        assert parts("all-linear", lora_exclude_modules=("linear_qkv", "mlp.up_proj"))[:3] == [
            "0.self_attention.linear_proj",
            "0.mlp.linear_fc1.gate_proj",
            "0.mlp.linear_fc2",
        ]
        config, _ = config_from_flags(flags("q_proj", lora_exclude_modules=(r".*layers\.1\..*q_.*",)), SHAPE)
        assert config.exclude_modules == r".*layers\.1\..*q_.*"
        assert len(parts("q_proj", lora_exclude_modules=(r".*layers\.1\..*q_.*",))) == 2


class TestPatterns:
    def test_ranks_and_alphas(self) -> None:
        given = flags(
            "q_proj",
            "linear_fc2",
            lora_rank_pattern={r"layers\.1\..*q_proj": 2, "q_proj": 3, "linear_fc2": 7},
            lora_alpha_pattern={"0.self_attn.q_proj": 1.5},
            use_rslora=True,
        )
        config, shared = config_from_flags(given, SHAPE)
        found = describe_adapter(config, SHAPE, shared).parts
        assert [(part.rank, part.alpha) for part in found] == [
            (3, 1.5),
            (7, 8),
            (2, 8),
            (7, 8),
            (3, 8),
            (7, 8),
        ]
        assert found[2].scaling == pytest.approx(8 / 2**0.5)
        assert config.rank_pattern == {r"layers\.1\..*q_proj": 2, "q_proj": 3, "down_proj": 7}

    def test_a_linear_as_one_matrix_has_one_rank(self) -> None:
        config, _ = config_from_flags(flags("linear_qkv", lora_rank_pattern={"linear_qkv": 2}), SHAPE)
        assert config.rank_pattern == {"q_proj": 2, "k_proj": 2, "v_proj": 2}
        with pytest.raises(
            Refused, match="linear_qkv is one adapter .* --lora-rank-pattern gives them 2 and 4"
        ):
            parts("linear_qkv", lora_rank_pattern={"k_proj": 2})
        with pytest.raises(Refused, match="--lora-alpha-pattern gives them 2 and 8"):
            parts("linear_qkv", lora_alpha_pattern={"q_proj": 2.0})

    @pytest.mark.parametrize(
        ("key", "words"),
        [("k_proj", "means none of the modules"), ("x", "means no module"), ("(", "no regular")],
    )
    def test_keys_that_mean_nothing(self, key: str, words: str) -> None:
        with pytest.raises(Refused, match=f"--lora-rank-pattern: .*{words}"):
            parts("q_proj", lora_rank_pattern={key: 2})


@pytest.mark.parametrize(
    ("targets", "others"),
    [
        (("linear_qkv", "linear_fc2"), {}),
        (
            ("q_proj", "v_proj"),
            {"lora_rank_pattern": {"v_proj": 2}, "lora_alpha_pattern": {"layers.1.*": 3.0}},
        ),
        (("all-linear",), {"lora_exclude_modules": ("k_proj", "linear_fc1")}),
        (("q_proj", "linear_fc2"), {"lora_layers_to_transform": (1, 2), "lora_layers_pattern": ("layers",)}),
        ((r".*\.[23]\..*(up|o)_proj",), {"use_rslora": True}),
        (
            (r"decoder\.layers\.[13]\..*", "model.layers.0.mlp.down_proj"),
            {"lora_exclude_modules": (".*o_proj",)},
        ),
    ],
)
def test_peft_understands_the_same(
    targets: tuple[str, ...], others: dict[str, Any], models: Any, tmp_path: Path
) -> None:
    """The same modules, ranks and scalings."""
    import json

    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    model = models("llama")
    shape = shape_of(model.path)
    config, shared = config_from_flags(flags(*targets, **others), shape)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config.to_json()))
    theirs = get_peft_model(model.load(), PeftConfig.from_pretrained(tmp_path))
    found = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    spec = describe_adapter(config, shape, shared)
    assert found == {name: (part.rank, part.scaling) for part in spec.parts for name in part.hf_modules}


class TestLatentAttention:
    """People's names on a model with multi-latent attention; Hugging Face's work by themselves."""

    MLA = MLAShape(q_lora_rank=6, kv_lora_rank=8, qk_head_dim=4, qk_pos_emb_head_dim=2, v_head_dim=5)
    V3 = dataclasses.replace(SHAPE, family="deepseek_v3", num_query_groups=4, kv_channels=6, mla=MLA)
    LITE = dataclasses.replace(V3, family="deepseek_v2", mla=dataclasses.replace(MLA, q_lora_rank=None))

    @pytest.mark.parametrize(
        ("shape", "name", "ours", "theirs"),
        [
            (V3, "linear_qkv", ["q_down", "kv_down"], ("q_a_proj", "kv_a_proj_with_mqa")),
            (V3, "self_attention.linear_q", ["q_up"], ("q_b_proj",)),
            (V3, "linear_kv", ["kv_up"], ("kv_b_proj",)),
            (V3, "linear_q_up_proj", ["q_up"], ("q_b_proj",)),
            (V3, "kv_a_proj_with_mqa", ["kv_down"], ("kv_a_proj_with_mqa",)),
            (LITE, "linear_qkv", ["q", "kv_down"], ("q_proj", "kv_a_proj_with_mqa")),
            (LITE, "linear_q", ["q"], ("q_proj",)),
        ],
    )
    def test_names(self, shape: ModelShape, name: str, ours: list[str], theirs: tuple[str, ...]) -> None:
        config, shared = config_from_flags(flags(name), shape)
        found = describe_adapter(config, shape, shared).parts
        assert [part.name for part in found] == [
            f"decoder.layers.{layer}.self_attention.linear_{linear}_proj"
            for layer in range(3)
            for linear in ours
        ]
        assert config.target_modules == theirs and not shared

    def test_the_four_linears_of_a_script(self) -> None:
        config, shared = config_from_flags(
            flags("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), self.V3
        )
        linears = {part.linear for part in describe_adapter(config, self.V3, shared).parts}
        assert linears == {
            *("linear_q_down_proj", "linear_kv_down_proj", "linear_proj", "linear_fc1", "linear_fc2")
        }
        assert shared == {"linear_fc1"}

    def test_they_are_no_names_of_other_models(self) -> None:
        with pytest.raises(Refused, match="the model has no module linear_kv"):
            parts("linear_kv")
