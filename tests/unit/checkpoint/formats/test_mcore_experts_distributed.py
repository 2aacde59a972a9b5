"""Rank files of experts against megatron-core's own models, named as Megatron-LM names its ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mindspeed_lora.checkpoint.canonical import padded_vocab_size
from mindspeed_lora.checkpoint.engine import execute
from mindspeed_lora.checkpoint.formats.mcore_experts import ExpertRanks
from mindspeed_lora.checkpoint.formats.mcore_writer import plan_mcore
from mindspeed_lora.checkpoint.source import open_source
from mindspeed_lora.config.stages import LayerPlacement
from tests.support.megatron_checkpoint import Layout
from tests.support.megatron_legacy import load_legacy, save_legacy
from tests.support.moe_models import moe_model
from tests.support.pool import WorkerPool

LAYOUTS = {
    "EP2": Layout(ep=2),
    "TP2 ETP1 EP2": Layout(tp=2, etp=1, ep=2),
    "TP2 ETP2": Layout(tp=2),
    "PP2": Layout(pp=2),
    "TP2 ETP2, grouped": Layout(tp=2, grouped=True),
    "EP2, grouped": Layout(ep=2, grouped=True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A model with dense layers, shared experts and an expert bias; one of experts alone, whose layers are grouped."""
    kinds = {False: "glm4_moe", True: "mixtral"}
    return {
        grouped: moe_model(kind, tmp_path_factory.mktemp("moe") / kind) for grouped, kind in kinds.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_the_ranks_save_is_read(
    folders: dict[bool, Path], layout: Layout, workers: WorkerPool, tmp_path: Path
):
    folder = folders[layout.grouped]
    workers.run(2, save_legacy, tmp_path, folder, layout)
    found, expected = open_source(tmp_path), open_source(folder)
    assert found.names() == expected.names()
    for name in expected.names():
        assert torch.equal(found.read(name), expected.read(name)), name


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_written_is_loaded_by_the_ranks(
    folders: dict[bool, Path], layout: Layout, workers: WorkerPool, tmp_path: Path
):
    folder = folders[layout.grouped]
    source = open_source(folder)
    experts = ExpertRanks(tp_size=layout.tp, ep_size=layout.ep, etp_size=layout.etp or layout.tp)
    padded = padded_vocab_size(source.shape, 1, layout.tp)
    placement = LayerPlacement.even(source.shape.num_layers, layout.pp)
    grouped = layout.grouped
    execute(plan_mcore(source, placement, layout.tp, padded, experts=experts, grouped=grouped), tmp_path)
    workers.run(2, load_legacy, tmp_path, folder, layout)
