"""Distributed checkpoints against megatron-core itself: what live models of one and two ranks save and load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_lora.checkpoint.canonical import padded_vocab_size
from mindspeed_lora.checkpoint.engine import execute
from mindspeed_lora.checkpoint.formats.torch_dist import TorchDistSource
from mindspeed_lora.checkpoint.formats.torch_dist_writer import plan_torch_dist
from mindspeed_lora.checkpoint.source import open_source
from mindspeed_lora.config.stages import LayerPlacement
from tests.support.megatron_checkpoint import TOKENS, Layout, load_live, save_live
from tests.support.pool import WorkerPool

SINGLE = {"singleton_local_shards": True}
NUMBERED = {"non_homogeneous_layers": True}

LAYOUTS: dict[str, tuple[str, Layout]] = {
    "llama-biased": ("llama-biased", Layout()),
    "tied TP2": ("llama-tied", Layout(tp=2)),
    "qwen2 TP2": ("qwen2", Layout(tp=2)),
    "qwen3 tied PP2, uneven": ("qwen3-tied", Layout(pp=2, first_stage=1)),
    "qwen2 TP2, numbered": ("qwen2", Layout(tp=2, metadata=NUMBERED)),
    "qwen3 PP2, numbered": ("qwen3-tied", Layout(pp=2, metadata=NUMBERED)),
    "biased TP2, gate and up apart": ("llama-biased", Layout(tp=2, metadata=SINGLE)),
}


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_what_megatron_core_saves_is_read_bit_for_bit(
    models: Callable[[str], Any], workers: WorkerPool, tmp_path: Path, kind: str, layout: Layout
) -> None:
    model = models(kind)
    logits = workers.run(layout.tp * layout.pp, save_live, tmp_path, model.path, layout)[0]
    expected, found = open_source(model.path), open_source(tmp_path)
    assert isinstance(found, TorchDistSource)
    assert found.names() == expected.names()
    for name in expected.names():
        assert found.dtype(name) == expected.dtype(name)
        assert torch.equal(found.read(name), expected.read(name)), name
    if logits is not None:
        # The live model is the one of transformers: no name or shard of ours was wrong both ways.
        assert_logits(logits, model)


def assert_logits(logits: torch.Tensor, model: Any) -> None:
    with torch.no_grad():
        theirs = model.load().float()(TOKENS).logits
    accuracy = 0.05 if model.kind == "llama-tied" else 1e-4
    torch.testing.assert_close(
        logits[..., : theirs.size(-1)], theirs, rtol=accuracy, atol=accuracy * theirs.abs().max().item()
    )


LOADED: dict[str, tuple[str, tuple[int, int], Layout]] = {
    "llama-biased, TP1 by TP1": ("llama-biased", (1, 1), Layout()),
    "qwen2, TP2 by TP2": ("qwen2", (2, 1), Layout(tp=2)),
    "qwen2, TP4 PP2 by TP2": ("qwen2", (4, 2), Layout(tp=2)),
    "qwen3 tied, TP1 by TP2": ("qwen3-tied", (1, 1), Layout(tp=2)),
    "qwen3 tied, TP2 PP2 by uneven PP2": ("qwen3-tied", (2, 2), Layout(pp=2, first_stage=1)),
    "tied bf16, TP2 by TP1": ("llama-tied", (2, 1), Layout()),
}
"""Model, TP and PP as written, layout of the live model that loads it."""


@pytest.mark.parametrize(("kind", "cut", "layout"), LOADED.values(), ids=LOADED)
def test_what_is_written_here_is_loaded_by_megatron_core(
    models: Callable[[str], Any],
    workers: WorkerPool,
    tmp_path: Path,
    kind: str,
    cut: tuple[int, int],
    layout: Layout,
) -> None:
    model, (tp, pp) = models(kind), cut
    source = open_source(model.path)
    placement = LayerPlacement.even(source.shape.num_layers, pp)
    execute(plan_torch_dist(source, placement, tp, padded_vocab_size(source.shape, 1, tp)), tmp_path)
    iteration = tmp_path / "iter_0000001"
    results = workers.run(layout.tp * layout.pp, load_live, iteration, model.path, layout)
    for logits, lacking, unused in results:
        assert not lacking
        # Of Transformer Engine's attention; megatron-core's own has no state.
        assert unused == {"decoder.layers.self_attention.core_attention._extra_state"}
        if logits is not None:
            assert_logits(logits, model)
