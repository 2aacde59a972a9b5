"""The adapter and the merged model that any layout saves are what PEFT and transformers understand by them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.adapters import new_adapter, write
from tests.support.differences import FACTOR, GRADIENT, LOGITS, largest_logit_difference
from tests.support.layouts import Layout
from tests.support.parity import ALPHA, RANK, Case, Outcome, ParityBench
from tests.support.reference import Recipe, Reference
from tests.support.shards import largest_relative_difference

STEPS = 5
LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(tp=2, sequence_parallel=True, dp=2, distributed_optimizer=True),
    Layout(tp=4, sequence_parallel=True),
    Layout(pp=4),
    Layout(tp=2, pp=2),
    Layout(dp=2, distributed_optimizer=True),
    Layout(cp=2, attention="ring", distributed_optimizer=True),
]


class FreshRuns:
    """Runs of Qwen3 whose adapter starts from the seed and is saved; made when first asked for."""

    def __init__(self, bench: ParityBench) -> None:
        self.bench = bench
        self.case = Case(model="qwen3", recipe=Recipe(steps=STEPS))
        self.base = bench.model(self.case.model)
        self._runs: dict[Layout, tuple[Outcome, Path]] = {}

    def run(self, layout: Layout) -> tuple[Outcome, Path]:
        """The run in a layout, and its ``--save`` folder."""
        if layout not in self._runs:
            save = self.bench.new_folder()
            argv = [
                *self.bench.flags(self.case),
                *self.bench.micro_batch_flags(self.case, layout),
                *layout.flags,
            ]
            argv += ["--lora-r", str(RANK), "--lora-alpha", str(ALPHA), "--save", str(save)]
            self._runs[layout] = self.bench.run(argv, layout, self.bench.probe()), save
        return self._runs[layout]


@pytest.fixture(scope="module")
def fresh(bench: ParityBench) -> FreshRuns:
    return FreshRuns(bench)


@pytest.fixture
def transformers_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Warnings in the logs of transformers and PEFT."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    transformers_logging.disable_propagation()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_peft_loads_the_adapter_and_gives_our_logits(
    layout: Layout, fresh: FreshRuns, transformers_log: pytest.LogCaptureFixture
) -> None:
    outcome, save = fresh.run(layout)
    reference = Reference(fresh.base)
    without_adapter = [reference.logits(row) for row in fresh.bench.probe_rows]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference.load_adapter(save / "adapter")
    assert not transformers_log.records
    logits = [reference.logits(row) for row in fresh.bench.probe_rows]
    ours = outcome.record([len(row) for row in fresh.bench.probe_rows]).end_logits
    assert largest_logit_difference(ours, logits) <= LOGITS
    assert largest_logit_difference(ours, without_adapter) > 100 * LOGITS


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_every_layout_starts_from_the_same_bits(layout: Layout, fresh: FreshRuns) -> None:
    alone, _ = fresh.run(Layout())
    outcome, _ = fresh.run(layout)
    assert set(outcome.start) == set(alone.start)
    assert all(outcome.start[name].equal(tensor) for name, tensor in alone.start.items())
    assert largest_relative_difference(outcome.end, alone.end) <= FACTOR


def test_peft_trains_on_from_our_start_as_we_do(fresh: FreshRuns, tmp_path: Path) -> None:
    """With B = 0: the first gradients of A are zero, on both sides."""
    from mindspeed_lora.checkpoint.source import open_source

    outcome, _ = fresh.run(Layout(tp=2, pp=2))
    shape = open_source(fresh.base).shape
    write(tmp_path / "start", shape, new_adapter(shape, RANK, ALPHA), outcome.start)
    reference = Reference(fresh.base)
    reference.load_adapter(tmp_path / "start")
    record = reference.train(fresh.bench.rows, fresh.case.recipe)
    assert largest_relative_difference(outcome.gradients, record.gradients) <= GRADIENT
    assert largest_relative_difference(outcome.end, record.end) <= FACTOR
    assert not any(gradient.any() for name, gradient in outcome.gradients.items() if name.endswith("lora_a"))


def test_merged_model_is_that_of_peft(fresh: FreshRuns, tmp_path: Path) -> None:
    """Both form W + (B·A)·s in fp32 and round once; only the order of a product's r terms may differ."""
    from mindspeed_lora.checkpoint.conversion.convert import convert
    from mindspeed_lora.config.commands import parse

    _, save = fresh.run(Layout(tp=2, pp=2))
    argv = ["--load-dir", str(fresh.base), "--lora-load", str(save), "--save-model-type", "hf"]
    convert(parse("convert", [*argv, "--save-dir", str(tmp_path)]))
    ours, theirs = Reference(tmp_path / "mg2hf"), Reference(fresh.base)
    theirs.load_adapter(save / "adapter")
    theirs.merge_adapter()
    merged = theirs.model.state_dict()
    for name, weight in ours.model.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=1e-6, atol=1e-7)
    for row in fresh.bench.probe_rows:
        assert float((ours.logits(row) - theirs.logits(row)).abs().max()) <= LOGITS
