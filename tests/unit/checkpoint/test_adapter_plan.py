"""The LoRA flags and the files of --lora-load, brought together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mindspeed_lora.checkpoint.adapter import write_adapter
from mindspeed_lora.checkpoint.adapter_plan import plan_adapter
from mindspeed_lora.checkpoint.canonical import linear_shapes
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused

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
TARGETS = ("linear_qkv", "linear_fc2")


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    """A PEFT folder with rank 4, alpha 6 on two of the four linears."""

    def factor(name: str) -> torch.Tensor:
        rows, columns = linear_shapes(SHAPE)[name.split(".")[-2]]
        return torch.ones((4, columns) if name.endswith("lora_a") else (rows, 4))

    write_adapter(tmp_path / "adapter", SHAPE, 4, 6, 0.0, TARGETS, None, factor)
    return str(tmp_path / "adapter")


def test_no_lora_flag_is_no_adapter() -> None:
    assert plan_adapter(LoraConfig(), SHAPE, 1) is None


def test_a_new_adapter_is_what_the_flags_say() -> None:
    lora = LoraConfig(
        lora_r=8, lora_alpha=12, lora_dropout=0.1, lora_target_modules=("linear_fc1", "linear_fc1")
    )
    plan = plan_adapter(lora, SHAPE, 7)
    assert plan is not None and plan.source is None and plan.seed == 7
    assert (plan.spec.rank, plan.spec.alpha, plan.spec.dropout) == (8, 12, 0.1)
    assert plan.spec.target_modules == ("linear_fc1",)


def test_the_files_tell_what_the_flags_leave_out(adapter: str) -> None:
    plan = plan_adapter(LoraConfig(lora_load=adapter), SHAPE, 1)
    assert plan is not None and plan.source is not None
    assert (plan.spec.rank, plan.spec.alpha, plan.spec.scaling) == (4, 6, 1.5)
    assert set(plan.spec.target_modules) == set(TARGETS)


def test_equal_flags_are_no_contradiction(adapter: str) -> None:
    lora = LoraConfig(
        lora_load=adapter, lora_r=4, lora_alpha=6, lora_target_modules=("linear_fc2", "linear_qkv")
    )
    plan = plan_adapter(lora, SHAPE, 1)
    assert plan is not None and plan.spec.rank == 4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lora_r": 8}, "--lora-r 8 (the adapter has 4)"),
        ({"lora_alpha": 8}, "--lora-alpha 8 (the adapter has 6)"),
        ({"lora_target_modules": ("linear_qkv",)}, "--lora-target-modules linear_qkv (the adapter has "),
    ],
)
def test_a_contradicting_flag_is_refused_with_both_values(
    adapter: str, given: dict[str, object], words: str
) -> None:
    with pytest.raises(Refused) as error:
        plan_adapter(LoraConfig(lora_load=adapter, **given), SHAPE, 1)  # type: ignore[arg-type]
    assert words in str(error.value)
