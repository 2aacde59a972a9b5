"""What PEFT trains beside the factors trains here too, sharded: ``modules_to_save`` and ``bias``, tied and not.

Saved, it is what PEFT loads; merged, it is the model that was trained.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mindspeed_lora.checkpoint.conversion.convert import convert
from mindspeed_lora.config.commands import parse
from tests.support.differences import (
    LOGITS,
    LOSS_BETWEEN_LAYOUTS,
    Differences,
    largest_logit_difference,
    largest_ratio,
)
from tests.support.layouts import Layout
from tests.support.parity import Case, Outcome, ParityBench
from tests.support.reference import Reference

SP2 = Layout(tp=2, sequence_parallel=True)
FOUR = Layout(tp=2, pp=2, sequence_parallel=True)


@dataclass(frozen=True)
class Choice:
    """What is trained on which model, and the layout of the default run."""

    model: str
    peft: dict[str, Any]
    layout: Layout
    untied: bool = False
    """The merged model's embeddings are no longer tied."""
    resize: int | None = None
    """PEFT made the adapter for a model with so many words; tokens of the rows are from the first 131."""

    @property
    def case(self) -> Case:
        """The same for the parity bench."""
        peft = {"target_modules": ["q_proj", "v_proj", "down_proj"], **self.peft}
        return Case(model=self.model, peft=json.dumps(peft), resize=self.resize)


CHOICES = {
    "vocabulary": Choice("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}, FOUR),
    "tied embedding": Choice("llama-tied", {"modules_to_save": ["embed_tokens"]}, FOUR, untied=True),
    "tied output layer": Choice(
        "llama-tied",
        {"modules_to_save": ["lm_head"]},
        Layout(tp=2, dp=2, distributed_optimizer=True),
        untied=True,
    ),
    "both ends of tied": Choice(
        "llama-tied", {"modules_to_save": ["lm_head", "embed_tokens"]}, Layout(pp=2), untied=True
    ),
    "kept tied": Choice("llama-tied", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, FOUR),
    "norms": Choice("qwen3", {"modules_to_save": ["norm"]}, SP2),
    "linears": Choice(
        "llama-bias", {"modules_to_save": ["o_proj", "mlp"], "target_modules": ["q_proj"]}, SP2
    ),
    "all biases": Choice("llama-bias", {"bias": "all", "modules_to_save": ["model.norm"]}, SP2),
    "tokens": Choice(
        "llama", {"trainable_token_indices": {"embed_tokens": [5, 3, 130], "lm_head": [3, 100]}}, FOUR
    ),
    "tokens of tied": Choice("llama-tied", {"trainable_token_indices": [77, 3, 130]}, FOUR),
    "resized": Choice("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}, FOUR, resize=134),
    "resized, frozen": Choice("llama", {}, SP2, resize=134),
    "resized, frozen and tied": Choice("llama-tied", {}, FOUR, resize=134),
    "resized, tokens": Choice(
        "llama", {"trainable_token_indices": {"embed_tokens": [131, 5], "lm_head": [133]}}, FOUR, resize=134
    ),
    "resized, tokens of tied": Choice(
        "llama-tied", {"trainable_token_indices": [5, 133]}, Layout(pp=2), resize=134
    ),
    "biases of adapters": Choice("llama-bias", {"bias": "lora_only"}, Layout(tp=2, dp=2)),
}
OTHERS = [
    Layout(),
    Layout(tp=4),
    Layout(pp=4, recompute="uniform"),
    Layout(tp=2, pp=2, dp=2, distributed_optimizer=True),
]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, choice.layout) for name, choice in CHOICES.items()),
        *(pytest.param(name, layout, marks=pytest.mark.slow) for name in CHOICES for layout in OTHERS),
    ],
    ids=str,
)
def test_trains_as_peft_and_goes_back(
    name: str, layout: Layout, bench: ParityBench, tmp_path: Path, within: Callable[[Differences], None]
) -> None:
    choice = CHOICES[name]
    outcome = bench.train(choice.case, layout, ["--save", str(tmp_path / "run")])
    within(bench.compare(choice.case, outcome))
    ours = outcome.record([len(row) for row in bench.probe_rows]).end_logits
    with warnings.catch_warnings():
        # PEFT warns of tied embeddings whatever is done about them.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        reference = Reference(bench.model(choice.model))
        if choice.resize is not None:
            reference.resize(choice.resize, value=9.0)
        reference.load_adapter(tmp_path / "run" / "adapter", tied=False)
    assert largest_logit_difference(ours, [reference.logits(row) for row in bench.probe_rows]) <= LOGITS
    check_form(bench.starting_adapter(choice.case), tmp_path / "run" / "adapter")
    check_merged(choice, bench, outcome, tmp_path)


def check_form(before: Path, after: Path) -> None:
    """The configuration says the same, and the file holds tensors of the same names and shapes."""
    from safetensors.torch import load_file

    old, new = (json.loads((folder / "adapter_config.json").read_text()) for folder in (before, after))
    for key in ("modules_to_save", "bias", "ensure_weight_tying", "trainable_token_indices"):
        assert new[key] == old[key]
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (before, after)]
    idle = (
        "original_module",
        ".modules_to_save.",
    )  # written by PEFT for itself, where a vocabulary was resized
    shapes = [
        {name: tensor.shape for name, tensor in one.items() if not any(word in name for word in idle)}
        for one in tensors
    ]
    assert shapes[0] == shapes[1]


def check_merged(choice: Choice, bench: ParityBench, outcome: Outcome, folder: Path) -> None:
    """Merged by way of a Megatron checkpoint, transformers computes our logits."""
    merge = [
        "--load-dir",
        bench.model(choice.model),
        "--lora-load",
        folder / "run",
        "--save-model-type",
        "mg",
    ]
    layout = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"]
    back = ["--load-dir", folder / "mg", "--save-model-type", "hf", "--save-dir", folder / "hf"]
    for words in ([*merge, "--save-dir", folder / "mg", *layout], back):
        convert(parse("convert", [str(word) for word in words]))
    merged = Reference(folder / "hf" / "mg2hf")
    assert merged.config.vocab_size == (choice.resize or 131)
    assert merged.config.tie_word_embeddings == (choice.model == "llama-tied" and not choice.untied)
    ours = outcome.record([len(row) for row in bench.probe_rows]).end_logits
    assert largest_logit_difference(ours, [merged.logits(row) for row in bench.probe_rows]) <= LOGITS


FLAGS = {
    "llama-tied": ["--lora-modules-to-save", "output_layer", "final_layernorm"],
    "llama-bias": ["--lora-bias", "lora_only", "--lora-target-modules", "k_proj", "linear_fc1"],
}


@pytest.mark.parametrize("model", FLAGS)
def test_a_run_from_flags_resumes_in_another_layout(model: str, bench: ParityBench) -> None:
    words = [
        *bench.flags(Case(model=model)),
        *FLAGS[model],
        "--micro-batch-size",
        "1",
    ]
    whole = bench.run(words, Layout())
    assert any("lora" not in name for name in whole.start)
    save = bench.new_folder()
    saving = ["--save", str(save), "--save-interval", "3"]
    half = bench.run([*words, *FOUR.flags, *saving], FOUR)
    assert largest_ratio(half.losses, whole.losses) <= LOSS_BETWEEN_LAYOUTS
    (save / "latest_checkpointed_iteration.txt").write_text("3")
    # Other padding of the vocabulary, too.
    resumed = bench.run([*words, *saving, "--resume", "auto"], Layout())
    assert largest_ratio(resumed.losses, whole.losses[3:]) <= LOSS_BETWEEN_LAYOUTS
