"""Adapters made by PEFT with its own choices of modules, ranks and layers train here as there, and go back unchanged.

Each matrix of a fused linear has factors of its own, as in PEFT.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.differences import (
    FACTOR,
    LOGITS,
    LOSS_BETWEEN_LAYOUTS,
    Differences,
    largest_logit_difference,
    largest_ratio,
)
from tests.support.layouts import Layout
from tests.support.parity import Case, ParityBench
from tests.support.reference import Recipe, Reference
from tests.support.shards import largest_relative_difference

CHOICES: dict[str, dict[str, Any]] = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "ranks": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.[12]\..*up_proj": 7, "model.layers.3.self_attn.v_proj": 1},
        "alpha_pattern": {"layers.0.self_attn.o_proj": 3, "up_proj": 20.5},
        "use_rslora": True,
    },
    "layers": {
        "target_modules": ["k_proj", "gate_proj", "down_proj"],
        "layers_to_transform": [0, 3],
        "layers_pattern": "layers",
        "lora_dropout": 0.1,
    },
    "expression": {"target_modules": r".*\.[13]\..*\.(v|gate)_proj"},
    "all but some": {
        "target_modules": "all-linear",
        "exclude_modules": ["k_proj", "gate_proj", "1.mlp.up_proj"],
    },
}
DEFAULT = {
    "q and v": Layout(tp=2, pp=2, sequence_parallel=True),
    "ranks": Layout(tp=2, sequence_parallel=True, recompute="uniform"),
    "layers": Layout(tp=2, dp=2, distributed_optimizer=True),
    "expression": Layout(pp=2, recompute="block"),
    "all but some": Layout(tp=2, pp=2),
}
OTHERS = [Layout(), Layout(tp=4, sequence_parallel=True), Layout(pp=4), Layout(tp=2, pp=2, dp=2)]
KEPT = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
)


def case(name: str) -> Case:
    return Case(peft=json.dumps(CHOICES[name]), recipe=Recipe(dropout=CHOICES[name].get("lora_dropout", 0.0)))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *DEFAULT.items(),
        *(pytest.param(name, layout, marks=pytest.mark.slow) for name in CHOICES for layout in OTHERS),
    ],
    ids=str,
)
def test_peft_adapter_trains_on_and_goes_back(
    name: str, layout: Layout, bench: ParityBench, within: Callable[[Differences], None]
) -> None:
    save = bench.new_folder()
    outcome = bench.train(case(name), layout, ["--save", str(save)])
    within(bench.compare(case(name), outcome))
    before, after = (configuration(path) for path in (bench.starting_adapter(case(name)), save / "adapter"))
    assert {key: after[key] for key in KEPT} == {key: before[key] for key in KEPT}
    reference = Reference(bench.model("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference.load_adapter(save / "adapter", tied=False)
    logits = [reference.logits(row) for row in bench.probe_rows]
    ours = outcome.record([len(row) for row in bench.probe_rows]).end_logits
    assert largest_logit_difference(ours, logits) <= LOGITS


def configuration(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, its lists in order."""
    values = json.loads((folder / "adapter_config.json").read_text())
    return {key: sorted(value) if isinstance(value, list) else value for key, value in values.items()}


FRESH = [
    *("--lora-target-modules", "linear_fc1", "q_proj", "v_proj", "o_proj", "--lora-r", "4"),
    *("--lora-rank-pattern", '{"v_proj": 3}', "--use-rslora"),
]


def test_new_factors_start_from_the_same_bits_and_resume_in_another_layout(bench: ParityBench) -> None:
    """Mixed names: one A for gate and up, q and v each for itself."""
    recipe = Recipe()
    words = [*bench.flags(Case(recipe=recipe)), *FRESH, "--micro-batch-size", "1"]
    whole = bench.run(words, Layout())
    assert {name.split(".", 3)[3] for name in whole.start} == {
        f"{part}.lora_{factor}"
        for part in (
            "self_attention.linear_qkv.q_proj",
            "self_attention.linear_qkv.v_proj",
            "self_attention.linear_proj",
            "mlp.linear_fc1",
        )
        for factor in "ab"
    }
    save, layout = bench.new_folder(), Layout(tp=2, pp=2, sequence_parallel=True)
    saving = ["--save", str(save), "--save-interval", "3"]
    half = bench.run([*words, *layout.flags, *saving], layout)
    assert all(half.start[name].equal(tensor) for name, tensor in whole.start.items())
    (save / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = bench.run([*words, *saving, "--resume", "auto"], Layout())
    assert largest_ratio(resumed.losses, whole.losses[3:]) <= LOSS_BETWEEN_LAYOUTS
    assert largest_relative_difference(resumed.end, whole.end) <= FACTOR
