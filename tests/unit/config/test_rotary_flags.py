"""Flags of longrope, against a checkpoint and alone, in the words of MindSpeed-LLM's scripts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mindspeed_lora.config.checks import check_layout, reconcile
from mindspeed_lora.config.commands import parse
from mindspeed_lora.config.model import ModelConfig
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.shape import RopeScaling
from mindspeed_lora.config.shape_flags import shape_from_flags
from mindspeed_lora.errors import Refused

SHAPE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --max-position-embeddings 128 --vocab-size 64 "
    "--swiglu --untie-embeddings-and-output-weights --position-embedding-type rope"
)
LONGROPE = (
    "--rope-scaling-type longrope --longrope-freqs-type outer --rope-scaling-original-max-position-embeddings 16 "
    "--short-factor 1,1.1,1.5,2 --long-factor 1,3.0,20,60"
)
EXPECTED = RopeScaling(
    rope_type="longrope",
    factor=8.0,
    original_max_position_embeddings=16,
    short_factor=(1.0, 1.1, 1.5, 2.0),
    long_factor=(1.0, 3.0, 20.0, 60.0),
)


def flags(words: str) -> ModelConfig:
    job = parse("posttrain", f"--stage sft --data-path rows --train-iters 1 {words}".split())
    found: ModelConfig = job.model
    return found


def test_flags_alone_tell_the_scaling() -> None:
    shape = shape_from_flags(flags(f"{SHAPE} {LONGROPE}"))
    assert shape.rope_scaling == EXPECTED and shape.family == "phi3" and not shape.features
    check_layout(shape, ParallelConfig())
    own = shape_from_flags(flags(f"{SHAPE} {LONGROPE} --short-mscale 1.1 --long-mscale 1.2"))
    assert own.rope_scaling == dataclasses.replace(EXPECTED, short_mscale=1.1, long_mscale=1.2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--rope-scaling-type longrope --short-factor 1,2",
            "needs --original-max-position-embeddings, --long",
        ),
        (f"{LONGROPE} --long-mscale 2", "--short-mscale and --long-mscale are given together"),
        (f"{LONGROPE} --short-factor 1,2", r"short_factor .* has 2 numbers, and its heads have 4 rotary"),
        (f"{LONGROPE} --original-max-position-embeddings 1", "is 1; longrope needs 2 or more"),
        (f"{LONGROPE} --short-factor 1,x", "--short-factor 1,x: expected numbers above 0 with commas"),
        (f"{LONGROPE} --long-factor 1,0,2,2", "--long-factor 1,0,2,2: expected numbers above 0"),
    ],
)
def test_scalings_that_cannot_be(words: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        check_layout(shape_from_flags(flags(f"{SHAPE} {words}")), ParallelConfig())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, None),
        ({"rope_scaling_factor": 8.0, "short_factor": "1,1.1000000001,1.5,2"}, None),
        (
            {"original_max_position_embeddings": 4096},
            "--original-max-position-embeddings 4096 (checkpoint: 16)",
        ),
        ({"long_factor": "1,3,20"}, "--long-factor (checkpoint: other numbers)"),
        ({"short_mscale": 1.1}, "--short-mscale 1.1 (checkpoint: none)"),
        ({"rope_scaling_type": "yarn"}, "--rope-scaling-type yarn (checkpoint: longrope)"),
    ],
)
def test_flags_against_a_checkpoint(given: dict[str, Any], told: str | None) -> None:
    shape = shape_from_flags(flags(f"{SHAPE} {LONGROPE}"))
    if told is None:
        assert reconcile(ModelConfig(**given), shape) == shape
        return
    with pytest.raises(Refused) as error:
        reconcile(ModelConfig(**given), shape)
    assert told in str(error.value)


def test_factors_for_a_model_without_them() -> None:
    with pytest.raises(Refused, match=r"--short-factor \(checkpoint: none\)"):
        reconcile(ModelConfig(short_factor="1,2"), shape_from_flags(flags(SHAPE)))
