"""Without a LoRA flag all parameters are trained: gradients of embeddings, norms and biases, sharded and tied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mindspeed_lora.checkpoint.source import open_source
from tests.support.differences import Differences
from tests.support.layouts import LAYERS, Layout
from tests.support.parity import Case, ParityBench
from tests.support.reference import Recipe


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        # A norm's gradient is partial over TP only under SP; that of a head norm in any case.
        ("qwen3", Layout()),
        ("qwen3", Layout(tp=2)),
        ("qwen3", Layout(cp=2, attention="ring", distributed_optimizer=True)),
        ("qwen3", Layout(tp=2, sequence_parallel=True, recompute="uniform")),
        # A row-parallel bias stands after the reduce-scatter.
        ("llama-bias", Layout(tp=2, sequence_parallel=True, dp=2, distributed_optimizer=True)),
        ("qwen2", Layout(tp=2, dp=2)),
        # A tied embedding is held by both ends of the pipeline.
        ("llama-tied", Layout(tp=2, sequence_parallel=True)),
        ("llama-tied", Layout(pp=2, dp=2, distributed_optimizer=True, recompute="block")),
        ("llama-tied", Layout(tp=2, pp=2, sequence_parallel=True)),
        ("llama-tied", Layout(pp=2, vpp=2, dp=2, distributed_optimizer=True, overlap="gather")),
        ("llama", Layout(tp=2, pp=2, sequence_parallel=True, stages="uneven", recompute="uniform")),
        ("llama", Layout(tp=4, recompute="selective")),
    ],
    ids=str,
)
def test_full_training_is_exact(
    model: str, layout: Layout, bench: ParityBench, within: Callable[[Differences], None]
) -> None:
    case = Case(model=model, targets=None)
    within(bench.compare(case, bench.train(case, layout)))


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("llama-tied", Layout(pp=2, vpp=2)),
        ("llama", Layout(tp=2, pp=2, stages="noops")),
        ("qwen3", Layout(pp=2, vpp=2, stages="noops")),
        ("llama", Layout(pp=2, stages="uneven")),
    ],
    ids=str,
)
def test_a_saved_model_is_read_whatever_its_stages(
    model: str, layout: Layout, bench: ParityBench, tmp_path: Path
) -> None:
    case = Case(model=model, targets=None, recipe=Recipe(steps=4))
    outcome = bench.train(case, layout, ["--save", str(tmp_path / "run")])
    source = open_source(tmp_path / "run")
    assert source.shape.num_layers == LAYERS
    assert set(source.names()) == set(outcome.end)
    for name, trained in outcome.end.items():
        found = source.read(name)
        assert found.equal(trained[: len(found)]), name
