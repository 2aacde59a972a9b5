"""Which weights a job holds quantised, and what is refused before any process joins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_lora.checkpoint.loading.quantization import QuantPlan, plan_quantization
from mindspeed_lora.checkpoint.loading.random_weights import RandomSource
from mindspeed_lora.config.commands import parse
from mindspeed_lora.config.quantization import QuantFlags, QuantSettings
from mindspeed_lora.errors import Failed, Refused
from mindspeed_lora.models.families import shape_from_config
from tests.support.models import make_model
from tests.support.tiny import Tiny, plan

LINEARS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def planned(tiny: Tiny, **flags: Any) -> QuantPlan:
    found = plan(tiny.words(**{"qlora": True, **flags})).quantization
    assert found is not None
    return found


def names(*places: str) -> set[str]:
    return {f"decoder.layers.{layer}.{place}.weight" for layer in range(4) for place in places}


def test_the_linears_of_every_layer(tiny: Tiny) -> None:
    found = planned(tiny)
    assert found.settings == QuantSettings("nf4", 64, False)
    assert found.weights == names(*LINEARS)
    assert plan(tiny.words()).quantization is None


def test_flags_say_how(tiny: Tiny) -> None:
    assert planned(tiny, quant_type="fp4", quant_block_size=128, quant_double=True).settings == QuantSettings(
        "fp4", 128, True
    )
    assert planned(tiny, qlora=None, qlora_nf4=True).settings.kind == "nf4"


@pytest.mark.parametrize(
    ("skipped", "left"),
    [
        (("linear_proj",), ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")),
        (
            ("o_proj", "lm_head", "model.norm"),
            ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"),
        ),
        (("q_proj", "k_proj", "v_proj", "output_layer", "embedding.word_embeddings"), LINEARS[1:]),
        ((r"model\.layers\.\d+\.mlp\..*",), LINEARS[:2]),
    ],
    ids=str,
)
def test_skipped_modules(tiny: Tiny, skipped: tuple[str, ...], left: tuple[str, ...]) -> None:
    assert planned(tiny, quant_skip_modules=skipped).weights == names(*left)


def test_what_is_trained_whole_stays_plain(tiny: Tiny) -> None:
    flags = {"lora_modules_to_save": ("linear_fc2",), "lora_target_modules": ("linear_qkv",)}
    assert planned(tiny, **flags).weights == names(*LINEARS[:3])
    told = plan(tiny.words(qlora=True, **flags)).notices
    assert any("trained and therefore not quantised: decoder.layers.0.mlp.linear_fc2" in one for one in told)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            {"quant_skip_modules": ("q_proj",)},
            "--quant-skip-modules q_proj: it is one matrix with k_proj, v_proj in",
        ),
        ({"quant_skip_modules": ("nothing",)}, "--quant-skip-modules: the model has no module nothing"),
        (
            {"lora_save_base": True, "save": "run"},
            "--lora-save-base with --qlora saves the frozen model dequantised; add --qlora-save-dequantize",
        ),
    ],
    ids=str,
)
def test_refusals(tiny: Tiny, flags: dict[str, Any], words: str, tmp_path: Path) -> None:
    if "save" in flags:
        flags = {**flags, "save": tmp_path / "run"}
    with pytest.raises(Refused) as error:
        planned(tiny, **flags)
    assert words in str(error.value)


def test_some_experts_alone(tmp_path: Path) -> None:
    folder = make_model("mixtral", tmp_path / "model")
    shape = shape_from_config(json.loads((folder / "config.json").read_text()))
    source = RandomSource(shape, 1, 0.02)
    flags = QuantFlags(qlora=True, quant_skip_modules=("experts.1.w2",))
    with pytest.raises(Refused, match=r"3 of a layer's 4 experts would be quantised"):
        plan_quantization(flags, source, shape, None)
    found = plan_quantization(QuantFlags(qlora=True), source, shape, None)
    assert found is not None and len(found.weights) == 4 * (2 + 2 * 4)
    assert not any("router" in name for name in found.weights)


def test_random_weights_are_told(tiny: Tiny) -> None:
    shape = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --max-position-embeddings 64 --vocab-size 131"
    found = plan(
        [*tiny.words(load=None, qlora=True), *shape.split(), "--untie-embeddings-and-output-weights"]
    )
    assert found.quantization is not None
    assert "--load is left out: the model starts from random weights, quantised" in found.notices


class Stored(RandomSource):
    """A checkpoint that says it is quantised."""

    quantization = QuantSettings("nf4", 64, True)

    def is_quantized(self, name: str) -> bool:
        """But for one."""
        return "linear_proj" not in name


def stored_plan(tiny: Tiny, *words: str) -> QuantPlan | None:
    shape = plan(tiny.words()).shape
    flags = parse("posttrain", [*tiny.words(), *words]).quantization
    return plan_quantization(flags, Stored(shape, 1, 0.02), shape, None)


def test_a_quantised_checkpoint(tiny: Tiny) -> None:
    found = stored_plan(tiny, "--qlora")
    assert found is not None and found.settings == QuantSettings("nf4", 64, True)
    assert found.weights == names(LINEARS[0], *LINEARS[2:])
    assert stored_plan(tiny, "--qlora", "--quant-double", "--quant-block-size", "64") == found


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "holds quantised weights (nf4, blocks of 64, nested statistics), which only QLoRA"),
        ("--qlora --quant-type fp4", "--quant-type fp4: random weights is quantised already, as nf4"),
        ("--qlora --quant-block-size 128", "--quant-block-size 128: random weights is quantised already"),
    ],
)
def test_a_quantised_checkpoint_against_the_flags(tiny: Tiny, line: str, words: str) -> None:
    with pytest.raises(Refused) as error:
        stored_plan(tiny, *line.split())
    assert words in str(error.value)


def test_a_matrix_that_is_not_finite(tiny: Tiny, tmp_path: Path) -> None:
    from mindspeed_lora.parallel.groups import destroy_groups
    from tests.support.tiny import join, open_session

    folder = Path(shutil.copytree(tiny.model, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.self_attn.k_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    groups = join()
    try:
        with pytest.raises(
            Failed, match=r"layers\.2\.self_attn\.k_proj\.weight holds NaN .* row 3, column 5"
        ):
            open_session(tiny.words(load=folder, qlora=True), groups)
    finally:
        destroy_groups()
