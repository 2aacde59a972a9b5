"""Experts in distributed checkpoints, against megatron-core's own models with experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_lora.checkpoint.canonical import padded_vocab_size
from mindspeed_lora.checkpoint.engine import execute
from mindspeed_lora.checkpoint.formats.mcore_experts import ExpertRanks
from mindspeed_lora.checkpoint.formats.torch_dist import TorchDistSource
from mindspeed_lora.checkpoint.formats.torch_dist_writer import plan_torch_dist
from mindspeed_lora.checkpoint.source import Source, open_source
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.stages import LayerPlacement
from tests.support.megatron_checkpoint import Layout, load_live, save_live
from tests.support.moe_models import moe_model
from tests.support.pool import WorkerPool

SINGLE = {"singleton_local_shards": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The Hugging Face folder of a kind, built once; without what megatron-core's local layers lack."""
    built: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in built:
            built[kind] = moe_model(kind, tmp_path_factory.mktemp("moe") / kind)
        return built[kind]

    return get


def written(source: Source, folder: Path, experts: ExpertRanks, te: bool = False, **stages: Any) -> Path:
    placement = LayerPlacement.of(source.shape.num_layers, ParallelConfig(**stages))
    padded = padded_vocab_size(source.shape, 1, experts.tp_size)
    folder.mkdir(exist_ok=True)
    execute(plan_torch_dist(source, placement, experts.tp_size, padded, te, experts), folder)
    return folder


def assert_same(found: Source, expected: Source) -> None:
    assert isinstance(found, TorchDistSource)
    assert found.names() == expected.names()
    for name in expected.names():
        assert found.dtype(name) == expected.dtype(name)
        assert torch.equal(found.read(name), expected.read(name)), name


CUTS = {
    "one rank": (ExpertRanks(), {}),
    "EP4 PP2": (ExpertRanks(ep_size=4), {"pipeline_model_parallel_size": 2}),
    "TP2 ETP2 EP2": (ExpertRanks(tp_size=2, etp_size=2, ep_size=2), {"noop_layers": "0"}),
    "TP1 ETP2": (ExpertRanks(tp_size=1, etp_size=2, ep_size=2), {}),
    "TP2 EP2 extended": (ExpertRanks(tp_size=2, ep_size=2, extended=True), {}),
}


@pytest.mark.parametrize("te", [False, True], ids=["local", "te"])
@pytest.mark.parametrize("kind", ["mixtral", "glm4_moe"])
@pytest.mark.parametrize("cut", CUTS)
def test_there_and_back(
    cut: str, kind: str, te: bool, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    experts, stages = CUTS[cut]
    source = open_source(folders(kind))
    found = open_source(written(source, tmp_path, experts, te, **stages))
    assert_same(found, source)
    assert found.shape == source.shape


SAVED: dict[str, tuple[str, Layout]] = {
    "mixtral EP2": ("mixtral", Layout(ep=2)),
    "mixtral TP2": ("mixtral", Layout(tp=2)),
    "mixtral TP2 ETP1 EP2": ("mixtral", Layout(tp=2, ep=2, etp=1)),
    "mixtral EP2, each expert apart": ("mixtral", Layout(ep=2, metadata=SINGLE)),
    "mixtral TP2 ETP1 EP2, grouped": ("mixtral", Layout(tp=2, ep=2, etp=1, grouped=True)),
    "mixtral TP2 ETP2, grouped": ("mixtral", Layout(tp=2, grouped=True)),
    "glm4_moe TP2 EP2": ("glm4_moe", Layout(tp=2, ep=2, etp=1)),
    "qwen2_moe PP2": ("qwen2_moe", Layout(pp=2)),
}


@pytest.mark.parametrize(("kind", "layout"), SAVED.values(), ids=SAVED)
def test_what_megatron_core_saves_is_read_bit_for_bit(
    folders: Callable[[str], Path], workers: WorkerPool, tmp_path: Path, kind: str, layout: Layout
) -> None:
    folder = folders(kind)
    workers.run(2, save_live, tmp_path, folder, layout)
    assert_same(open_source(tmp_path), open_source(folder))


LOADED: dict[str, tuple[str, ExpertRanks, Layout]] = {
    "mixtral, one rank by EP2": ("mixtral", ExpertRanks(), Layout(ep=2)),
    "mixtral, EP4 by TP2, grouped": ("mixtral", ExpertRanks(ep_size=4), Layout(tp=2, grouped=True)),
    "mixtral, EP4 by TP2": ("mixtral", ExpertRanks(ep_size=4), Layout(tp=2)),
    "qwen3_moe, TP2 ETP2 EP2 by EP2": (
        "qwen3_moe",
        ExpertRanks(tp_size=2, etp_size=2, ep_size=2),
        Layout(ep=2),
    ),
    "glm4_moe, TP1 ETP2 by TP2 ETP1 EP2": (
        "glm4_moe",
        ExpertRanks(tp_size=1, etp_size=2),
        Layout(tp=2, ep=2, etp=1),
    ),
}


@pytest.mark.parametrize(("kind", "cut", "layout"), LOADED.values(), ids=LOADED)
def test_what_is_written_here_is_loaded_by_megatron_core(
    folders: Callable[[str], Path],
    workers: WorkerPool,
    tmp_path: Path,
    kind: str,
    cut: ExpertRanks,
    layout: Layout,
) -> None:
    folder = folders(kind)
    written(open_source(folder), tmp_path, cut)
    for _, lacking, unused in workers.run(2, load_live, tmp_path / "iter_0000001", folder, layout):
        assert not lacking
        assert all(key.endswith("core_attention._extra_state") for key in unused), unused
