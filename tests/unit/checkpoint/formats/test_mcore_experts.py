"""Experts in Megatron's rank files: every cut and every layout, there and back."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_lora.checkpoint.canonical import padded_vocab_size
from mindspeed_lora.checkpoint.engine import execute
from mindspeed_lora.checkpoint.formats.mcore import McoreSource
from mindspeed_lora.checkpoint.formats.mcore_experts import ExpertRanks
from mindspeed_lora.checkpoint.formats.mcore_writer import plan_mcore
from mindspeed_lora.checkpoint.source import Source, open_source
from mindspeed_lora.checkpoint.storage.manifest import check_files
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.stages import LayerPlacement
from mindspeed_lora.errors import Failed, Refused
from tests.support.moe_models import EXPERTS, HIDDEN, KINDS, WIDTH, moe_model

PP2 = {"pipeline_model_parallel_size": 2}
VPP = {**PP2, "num_layers_per_virtual_pipeline_stage": 1}
CUTS: dict[str, tuple[ExpertRanks, dict[str, Any]]] = {
    "one rank": (ExpertRanks(), {}),
    "EP2": (ExpertRanks(ep_size=2), {}),
    "EP4 PP2": (ExpertRanks(ep_size=4), PP2),
    "TP2 ETP2": (ExpertRanks(tp_size=2, etp_size=2), {}),
    "TP2 ETP2 EP2 PP2": (ExpertRanks(tp_size=2, etp_size=2, ep_size=2), PP2),
    "TP2 ETP1 EP2 VPP": (ExpertRanks(tp_size=2, etp_size=1, ep_size=2), VPP),
    "TP2 ETP1": (ExpertRanks(tp_size=2, etp_size=1), {}),
    "TP4 ETP2 EP2": (ExpertRanks(tp_size=4, etp_size=2, ep_size=2), {}),
    "TP2 EP2 extended": (ExpertRanks(tp_size=2, ep_size=2, extended=True), PP2),
}
FORMS = {"sequential": {}, "grouped": {"grouped": True}, "te": {"grouped": True, "transformer_engine": True}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The Hugging Face folder of a kind, built once."""
    built: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in built:
            built[kind] = moe_model(kind, tmp_path_factory.mktemp("moe") / kind)
        return built[kind]

    return get


def written(
    source: Source, folder: Path, experts: ExpertRanks, stages: dict[str, Any], **form: bool
) -> McoreSource:
    """A source written as a Megatron checkpoint and opened again."""
    placement = LayerPlacement.of(source.shape.num_layers, ParallelConfig(**stages))
    padded = padded_vocab_size(source.shape, 1, experts.tp_size)
    folder.mkdir()
    execute(plan_mcore(source, placement, experts.tp_size, padded, experts=experts, **form), folder)
    found = open_source(folder)
    assert isinstance(found, McoreSource)
    return found


def assert_same(found: Source, expected: Source) -> None:
    assert found.names() == expected.names()
    for name in expected.names():
        assert found.dtype(name) == expected.dtype(name)
        assert torch.equal(found.read(name), expected.read(name)), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", CUTS)
def test_there_and_back(cut: str, form: str, folders: Callable[[str], Path], tmp_path: Path):
    source = open_source(folders("glm4_moe"))
    experts, stages = CUTS[cut]
    found = written(source, tmp_path / "mg", experts, stages, **FORMS[form])
    assert_same(found, source)
    assert found.shape == source.shape


@pytest.mark.parametrize("kind", KINDS)
def test_args_alone_tell_the_model(kind: str, folders: Callable[[str], Path], tmp_path: Path):
    source = open_source(folders(kind))
    experts, stages = CUTS["TP2 ETP2 EP2 PP2"]
    written(source, tmp_path / "mg", experts, stages)
    shutil.rmtree(tmp_path / "mg" / "hf_config")
    found = open_source(tmp_path / "mg")
    assert found.shape == source.shape
    assert_same(found, source)


def rank_model(folder: Path, rank: str) -> dict[str, torch.Tensor]:
    """What torch itself loads of a rank's file."""
    file = folder / "iter_0000001" / rank / "model_optim_rng.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        return dict(torch.load(file, weights_only=True)["model"])


def test_grouped_experts_multiply_as_megatron_core_views_them(folders: Callable[[str], Path], tmp_path: Path):
    """``GroupedMLP``: ``weight1.view(E, h, -1)`` and ``weight2.view(E, -1, h)``, tokens from the left."""
    source = open_source(folders("mixtral"))
    experts = ExpertRanks(tp_size=2, etp_size=2, ep_size=2)
    written(source, tmp_path / "mg", experts, {}, grouped=True)
    model = rank_model(tmp_path / "mg", "mp_rank_01_001")
    local, half = EXPERTS // 2, WIDTH // 2
    w1, w2 = (model[f"decoder.layers.1.mlp.experts.weight{number}"] for number in (1, 2))
    assert w1.shape == (HIDDEN, local * 2 * half) and w2.shape == (local * half, HIDDEN)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    for number in range(local):
        place = f"decoder.layers.1.mlp.experts.local_experts.{local + number}"
        fc1, fc2 = (source.read(f"{place}.linear_fc{linear}.weight") for linear in (1, 2))
        gate, up = (block[half:] for block in fc1.split(WIDTH))
        hidden = x @ w1.view(local, HIDDEN, -1)[number]
        torch.testing.assert_close(hidden, x @ torch.cat([gate, up]).t())
        out = hidden[:, :half] @ w2.view(local, -1, HIDDEN)[number]
        torch.testing.assert_close(out, hidden[:, :half] @ fc2[:, half:].t())


def test_names_and_numbers_in_the_files(folders: Callable[[str], Path], tmp_path: Path):
    source = open_source(folders("qwen2_moe"))
    written(source, tmp_path / "mg", ExpertRanks(ep_size=2), PP2, grouped=True, transformer_engine=True)
    ranks = sorted(path.name for path in (tmp_path / "mg" / "iter_0000001").iterdir())
    assert ranks == ["mp_rank_00_000_000", "mp_rank_00_000_001", "mp_rank_00_001_000", "mp_rank_00_001_001"]
    one, two = (rank_model(tmp_path / "mg", rank) for rank in ranks[2:])
    assert list(one) == list(two)
    own = {name for name in one if ".experts." in name}
    linears = {f"linear_fc{linear}.weight{number}" for linear in (1, 2) for number in range(EXPERTS // 2)}
    # Layer 2 of the model, the first of this stage, is a dense one.
    assert own == {f"decoder.layers.1.mlp.experts.{name}" for name in linears}
    assert all(torch.equal(one[name], two[name]) for name in one if name not in own)
    assert not any(torch.equal(one[name], two[name]) for name in own)
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in one
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in one


def test_megatron_files_that_a_rank_reads():
    """Every rank of a world finds the file of its numbers, also where the experts' ranks wrap around."""
    for tp, etp, ep, world in ((2, 1, 2, 4), (2, 1, 3, 6), (4, 2, 2, 8), (4, 1, 8, 8), (2, 2, 4, 16)):
        ranks = ExpertRanks(tp_size=tp, etp_size=etp, ep_size=ep)
        for rank in range(world):
            file = rank % tp, rank // etp % ep
            assert file in ranks.files()
            assert ranks.place(*file) == (rank % etp, rank // etp % ep)
    assert ExpertRanks(tp_size=2, etp_size=1, ep_size=2).files() == [(0, 0), (1, 1)]


def test_an_expert_parallel_rank_is_missing(folders: Callable[[str], Path], tmp_path: Path):
    source = open_source(folders("mixtral"))
    written(source, tmp_path / "mg", ExpertRanks(ep_size=2), {})
    shutil.rmtree(tmp_path / "mg" / "iter_0000001" / "mp_rank_00_001")
    with pytest.raises(Refused, match="args.expert_model_parallel_size is 2, but the mp_rank_"):
        open_source(tmp_path / "mg")


def test_one_of_many_blocks_is_missing(folders: Callable[[str], Path], tmp_path: Path):
    source = open_source(folders("mixtral"))
    written(source, tmp_path / "mg", ExpertRanks(ep_size=4), {})
    shutil.rmtree(tmp_path / "mg" / "iter_0000001" / "mp_rank_00_002")
    with pytest.raises(Refused, match=r"tensors are missing: .*local_experts\.2\."):
        open_source(tmp_path / "mg")


def test_a_damaged_stacked_tensor_is_found_by_the_checksums(folders: Callable[[str], Path], tmp_path: Path):
    """The checksum of a tensor that is written in pieces is that of its bytes."""
    written(open_source(folders("mixtral")), tmp_path / "mg", ExpertRanks(), {}, grouped=True)
    assert check_files(tmp_path / "mg") > 0
    file = tmp_path / "mg/iter_0000001/mp_rank_00/model_optim_rng.pt"
    record = json.loads((tmp_path / "mg/checksums.json").read_text())["files"][
        "iter_0000001/mp_rank_00/model_optim_rng.pt"
    ]
    offset = record["tensors"]["model/decoder.layers.2.mlp.experts.weight1"][0]
    data = bytearray(file.read_bytes())
    data[offset + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(Failed, match=r"decoder\.layers\.2\.mlp\.experts\.weight1"):
        check_files(tmp_path / "mg")
