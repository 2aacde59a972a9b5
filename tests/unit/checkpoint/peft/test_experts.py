"""Adapters of experts in PEFT's two forms: PEFT itself loads what is written, and what it writes is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_lora.adapters.spec import AdapterSpec
from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.checkpoint.peft.config import AdapterConfig
from mindspeed_lora.checkpoint.peft.description import describe_adapter
from mindspeed_lora.checkpoint.peft.flags import config_from_flags
from mindspeed_lora.checkpoint.peft.plan import plan_adapter
from mindspeed_lora.checkpoint.peft.source import AdapterSource, write_adapter
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.errors import Refused
from tests.support.moe_models import KINDS, moe_model

Models = Callable[[str], Path]
FOUR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
EXPERTS = ("o_proj", "experts.linear_fc1", "experts.linear_fc2")
FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@pytest.fixture(scope="session")
def moe_models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The folder of a tiny model of a family, built once."""
    built: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in built:
            built[kind] = moe_model(kind, tmp_path_factory.mktemp("moe") / kind)
        return built[kind]

    return get


def flags(*targets: str, form: str | None = "fused", **others: Any) -> LoraConfig:
    return LoraConfig(lora_r=4, lora_alpha=8, lora_target_modules=targets, peft_moe_format=form, **others)


class Written:
    """An adapter with random factors, written by this program."""

    def __init__(self, base: Path, folder: Path, lora: LoraConfig) -> None:
        self.base, self.folder = base, folder
        self.shape = shape_of(base)
        self.config, self.shared = config_from_flags(lora, self.shape)
        self.spec: AdapterSpec = describe_adapter(self.config, self.shape, self.shared, lora.lora_moe_shared)
        generator = torch.Generator().manual_seed(0)
        self.values = {
            name: torch.randn(size, generator=generator) * 0.1 for name, size in self.spec.tensors.items()
        }
        for tensor in self.spec.trained:
            self.values[tensor.name] = torch.randn(tensor.size, generator=generator)
        write_adapter(folder, self.shape, self.config, self.spec, self.values)

    def names(self) -> set[str]:
        return {name.removeprefix("base_model.model.model.layers.") for name in load_file(self.weights)}

    @property
    def weights(self) -> Path:
        return self.folder / "adapter_model.safetensors"

    def assert_read_again(self, shared: Any = None, lora: LoraConfig | None = None) -> AdapterSource:
        """The same parts and bits by canonical name."""
        source = AdapterSource(self.folder, self.shape, shared, lora)
        assert [part.name for part in source.spec.parts] == [part.name for part in self.spec.parts]
        assert [part.scaling for part in source.spec.parts] == [part.scaling for part in self.spec.parts]
        for name, size in self.spec.tensors.items():
            assert torch.equal(source.read(name), self.values[name])
            half = [(size[0] // 2, size[0])]
            assert torch.equal(source.read(name, 0, half), self.values[name][size[0] // 2 :])
        return source


def merged_by_peft(base: Path, adapter: Path, folder: Path) -> dict[str, torch.Tensor]:
    """PEFT's merged model as transformers saves it, under the names of the family's files."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def assert_peft_merges_alike(source: AdapterSource, base: Path, folder: Path) -> None:
    """PEFT adds ``(B·A)·s`` of the very factors to each matrix, and changes nothing else."""
    before, after = load_file(base / "model.safetensors"), merged_by_peft(base, source.path, folder)
    assert set(before) == set(after)
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        if module in source.hf_modules and name.endswith(".weight"):
            lora_a, lora_b, scaling = source.factors(module)
            weight = weight + (lora_b @ lora_a) * scaling
        assert torch.equal(after[name], weight), name


@pytest.mark.parametrize("targets", [FOUR, (*EXPERTS, "router"), ("experts.linear_fc1",)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_the_fused_form(kind: str, targets: tuple[str, ...], moe_models: Models, tmp_path: Path):
    """Every family, dense and shared MLPs and routers beside the experts."""
    written = Written(moe_models(kind), tmp_path / "adapter", flags(*targets))
    source = written.assert_read_again()
    assert source.shared == written.shared
    assert_peft_merges_alike(source, written.base, tmp_path / "merged")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "glm4_moe"])
def test_peft_loads_the_per_expert_form(kind: str, moe_models: Models, tmp_path: Path):
    """PEFT 0.21 translates it for these families where no dense or shared MLP has factors."""
    written = Written(moe_models(kind), tmp_path / "adapter", flags(*EXPERTS, form="per-expert"))
    assert_peft_merges_alike(written.assert_read_again(), written.base, tmp_path / "merged")
    first = "0.block_sparse_moe.experts.0.w1" if kind == "mixtral" else "3.mlp.experts.0.gate_proj"
    assert f"{first}.lora_A.weight" in written.names()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_gate_and_up_apart_are_two_blocks_of_one_parameter(
    use_rslora: bool, moe_models: Models, tmp_path: Path
):
    lora = flags("experts.gate_proj", "experts.up_proj", "experts.down_proj", use_rslora=use_rslora)
    written = Written(moe_models("qwen3_moe"), tmp_path / "adapter", lora)
    file = load_file(written.weights)
    stored = file["base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"]
    assert stored.shape == (48, 8 * 4) and not stored.view(2, 24, 2, -1)[0, :, 1].any()
    source = written.assert_read_again()
    if not use_rslora:
        # With √ the scaling of twice the rank is the same up to rounding only.
        assert_peft_merges_alike(source, written.base, tmp_path / "merged")
    # Nothing trained yet: the zeros do not tell, the run that goes on does.
    zeros = {name: value * (not name.endswith("_b")) for name, value in written.values.items()}
    write_adapter(tmp_path / "new", written.shape, written.config, written.spec, zeros)
    again = AdapterSource(tmp_path / "new", written.shape, ())
    assert [part.name for part in again.spec.parts] == [part.name for part in written.spec.parts]


def test_one_pair_for_all_experts(moe_models: Models, tmp_path: Path):
    lora = flags(*EXPERTS, lora_moe_shared=True)
    for form in ("fused", "per-expert"):
        own = dataclasses.replace(lora, peft_moe_format=form)
        written = Written(moe_models("mixtral"), tmp_path / form, own)
        part = next(part for part in written.spec.parts if part.module.endswith("linear_fc1"))
        assert part.name == "decoder.layers.0.mlp.experts.linear_fc1"
        assert part.weight == "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight"
        written.assert_read_again(lora=own)
        assert_peft_merges_alike(
            AdapterSource(written.folder, written.shape), written.base, tmp_path / f"m-{form}"
        )
        loaded = plan_adapter(LoraConfig(lora_load=str(written.folder)), written.shape, 1)
        assert loaded is not None and loaded.spec.parts == written.spec.parts
        assert any("--lora-moe-shared" in notice for notice in loaded.notices)
    apart = Written(moe_models("mixtral"), tmp_path / "apart", flags(*EXPERTS))
    loaded = plan_adapter(LoraConfig(lora_load=str(apart.folder)), apart.shape, 1)
    assert loaded is not None and loaded.spec.parts == apart.spec.parts and not loaded.spec.moe_shared
    with pytest.raises(Refused, match=r"--lora-moe-shared: the factors of .*experts\.1\.w1"):
        AdapterSource(apart.folder, apart.shape, None, lora)
    with pytest.raises(Refused, match="only 1 of 4 get an adapter"):
        plan_adapter(flags("local_experts.2.linear_fc2", form=None, lora_moe_shared=True), apart.shape, 1)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "glm4_moe"])
@pytest.mark.parametrize("form", ["fused", "per-expert"])
def test_routers_and_gates_trained_whole(kind: str, form: str, moe_models: Models, tmp_path: Path):
    names = ("router", "shared_expert_gate") if kind == "qwen2_moe" else ("mlp.router",)
    lora = flags("linear_qkv", "experts.linear_fc2", form=form, lora_modules_to_save=names)
    written = Written(moe_models(kind), tmp_path / "adapter", lora)
    kept = {tensor.name.split(".", 3)[3] for tensor in written.spec.trained}
    own = {"qwen2_moe": "mlp.shared_experts.gate_weight", "glm4_moe": "mlp.router.expert_bias"}
    assert kept == {"mlp.router.weight", *([own[kind]] if kind in own else [])}
    source = AdapterSource(written.folder, written.shape)
    assert all(
        torch.equal(source.read_whole(name), value)
        for name, value in written.values.items()
        if source.holds_whole(name)
    )
    if form == "fused":
        after = merged_by_peft(written.base, written.folder, tmp_path / "merged")
        router = "block_sparse_moe.gate" if kind == "mixtral" else "mlp.gate"
        trained = written.values["decoder.layers.3.mlp.router.weight"]
        assert torch.equal(after[f"model.layers.3.{router}.weight"], trained)


class TestWhatPeftWrites:
    """Adapters made by the installed PEFT on the installed transformers."""

    def saved(self, base: Path, folder: Path, **config: Any) -> Path:
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **config}
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), PeftConfig(**options))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.1)
        model.save_pretrained(folder)
        return folder

    @pytest.mark.parametrize(
        "config",
        [
            {"target_parameters": list(FUSED), "target_modules": []},
            {"target_parameters": [FUSED[1]], "target_modules": ["q_proj"]},
            {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
            {
                "target_parameters": [FUSED[0], "mlp.gate.weight", "shared_experts.down_proj.weight"],
                "target_modules": ["o_proj"],
                "rank_pattern": {"experts.gate_up_proj": 6},
                "alpha_pattern": {r"layers\.3\..*gate_up_proj": 3},
            },
        ],
        ids=str,
    )
    def test_is_read(self, config: dict[str, Any], moe_models: Models, tmp_path: Path):
        base = moe_models("glm4_moe")
        folder = self.saved(base, tmp_path / "adapter", **config)
        source = AdapterSource(folder, shape_of(base))
        assert_peft_merges_alike(source, base, tmp_path / "merged")
        # What PEFT trains with one A for gate and up is one adapter for both.
        assert "experts.linear_fc1" in source.shared or FUSED[0] not in config.get("target_parameters", FUSED)

    def test_dense_mlps_alone_by_names_that_experts_have_too(self, moe_models: Models, tmp_path: Path):
        """On transformers 5 target_modules never means the experts of this family."""
        base = moe_models("qwen2_moe")
        folder = self.saved(base, tmp_path / "adapter", target_modules=["up_proj", "down_proj"])
        source = AdapterSource(folder, shape_of(base))
        assert {module.rpartition(".")[0].split(".", 3)[3] for module in source.hf_modules} == {
            "mlp",
            "mlp.shared_expert",
        }
        assert_peft_merges_alike(source, base, tmp_path / "merged")

    def test_damage_is_named(self, moe_models: Models, tmp_path: Path):
        base = moe_models("mixtral")
        folder = self.saved(base, tmp_path / "adapter", target_parameters=list(FUSED), target_modules=[])
        file = folder / "adapter_config.json"
        values = json.loads(file.read_text())
        file.write_text(json.dumps({**values, "r": 3}))
        with pytest.raises(Refused, match=r"has shape \[16, 32\]; r 3 for each of 4 experts .* \[12, 32\]"):
            AdapterSource(folder, shape_of(base))
        file.write_text(json.dumps({**values, "target_parameters": [FUSED[0]]}))
        with pytest.raises(Refused, match=r"experts\.lora_A\.weight"):
            AdapterSource(folder, shape_of(base))


class TestRefusals:
    @pytest.mark.parametrize(
        ("targets", "others", "sentence"),
        [
            (("experts.gate_proj",), {}, "leaves out .*up_proj; give --peft-moe-format per-expert"),
            (("local_experts.1.linear_fc2",), {}, "is one parameter for all experts of its layer"),
            (EXPERTS, {"lora_rank_pattern": {"experts.2.down_proj": 2}}, "with one rank, but .* 2 and 4"),
            (FOUR, {"lora_modules_to_save": ("experts",)}, "experts are trained by factors alone"),
        ],
    )
    def test_what_the_fused_form_cannot_say(
        self, targets: tuple[str, ...], others: Any, sentence: str, moe_models: Models
    ):
        shape = shape_of(moe_models("qwen3_moe"))
        with pytest.raises(Refused, match=sentence):
            plan_adapter(flags(*targets, **others), shape, 1)
        if "lora_modules_to_save" not in others:
            # Not asked for, the form that can say it is taken.
            plan = plan_adapter(flags(*targets, form=None, **others), shape, 1)
            assert plan is not None and plan.config.moe_format == "per-expert"
            assert "saved with its experts per-expert" in plan.notices[0]

    def test_flags_beside_an_adapter_of_either_form(self, moe_models: Models, tmp_path: Path):
        for form in ("fused", "per-expert"):
            lora = flags(*FOUR, form=form, lora_rank_pattern={"experts.linear_fc2": 2})
            written = Written(moe_models("qwen2_moe"), tmp_path / form, lora)
            again = dataclasses.replace(lora, lora_load=str(written.folder))
            plan = plan_adapter(again, written.shape, 1)
            assert plan is not None and plan.spec.parts == written.spec.parts
            other = dataclasses.replace(again, lora_rank_pattern={"experts.linear_fc2": 3})
            with pytest.raises(Refused, match="--lora-rank-pattern"):
                plan_adapter(other, written.shape, 1)
            without = dataclasses.replace(again, lora_target_modules=EXPERTS)
            with pytest.raises(Refused, match="--lora-target-modules"):
                plan_adapter(without, written.shape, 1)


def test_dropout_is_not_told_of_parameters(moe_models: Models):
    """PEFT refuses to load parameters' factors with dropout, and applies none at inference anyway."""
    shape = shape_of(moe_models("mixtral"))
    config, _ = config_from_flags(flags(*FOUR, lora_dropout=0.1), shape)
    assert isinstance(config, AdapterConfig) and config.dropout == 0.1
    assert config.to_json()["lora_dropout"] == 0.0
