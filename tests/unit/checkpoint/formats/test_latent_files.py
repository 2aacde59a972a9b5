"""Latent attention in Megatron's files, legacy and distributed, and as other programs write it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from mindspeed_lora.checkpoint.engine import execute
from mindspeed_lora.checkpoint.formats.mcore_experts import ExpertRanks
from mindspeed_lora.checkpoint.formats.mcore_writer import plan_mcore
from mindspeed_lora.checkpoint.formats.torch_dist_writer import plan_torch_dist
from mindspeed_lora.checkpoint.peft.source import AdapterSource
from mindspeed_lora.checkpoint.source import CheckpointSource, Source, open_source
from mindspeed_lora.config.lora import LoraFlags
from mindspeed_lora.config.shape import MLAShape, ModelShape, MoEShape
from mindspeed_lora.config.stages import LayerPlacement
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families.segments import Range

MLA = MLAShape(q_lora_rank=12, kv_lora_rank=10, qk_head_dim=6, qk_pos_emb_head_dim=4, v_head_dim=8)
SHAPE = ModelShape(
    family="deepseek_v3",
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=10,
    vocab_size=50,
    max_position_embeddings=64,
    mla=MLA,
    moe=MoEShape(
        num_experts=4,
        topk=2,
        ffn_hidden_size=8,
        dense_layers=(0,),
        shared_ffn_hidden_size=16,
        score_function="sigmoid",
        expert_bias=True,
        num_groups=2,
        group_score="top2",
    ),
)
LITE = dataclasses.replace(
    SHAPE,
    family="deepseek_v2",
    mla=dataclasses.replace(MLA, q_lora_rank=None),
    moe=MoEShape(num_experts=4, topk=2, ffn_hidden_size=8, normalise=False, num_groups=2),
)
LAYER = "decoder.layers.1.self_attention."


class Drawn(CheckpointSource):
    """A model of random tensors."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(Path("drawn"), shape, None, None)
        generator = torch.Generator().manual_seed(2)
        self.values = {name: torch.randn(size, generator=generator) for name, size in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def _fill(self, out: torch.Tensor, name: str, wanted: Sequence[Sequence[Range]]) -> None:
        value = self.values[name]
        for axis, ranges in enumerate(wanted):
            value = torch.cat([value.narrow(axis, start, stop - start) for start, stop in ranges], axis)
        out.copy_(value)


def written(source: Source, folder: Path, plan: str, te: bool, tp: int) -> Path:
    experts = ExpertRanks(tp_size=tp, etp_size=1, ep_size=2)
    placement = LayerPlacement.even(source.shape.num_layers, 2)
    planner = plan_mcore if plan == "mg" else plan_torch_dist
    execute(planner(source, placement, tp, 50, te, experts), folder)
    return folder


def assert_same(found: Source, expected: Source) -> None:
    assert found.names() == expected.names()
    for name in expected.names():
        assert torch.equal(found.read(name), expected.read(name)), name


@pytest.mark.parametrize("shape", [SHAPE, LITE], ids=["v3", "lite"])
@pytest.mark.parametrize("te", [False, True], ids=["local", "te"])
@pytest.mark.parametrize("plan", ["mg", "torch_dist"])
def test_there_and_back(shape: ModelShape, te: bool, plan: str, tmp_path: Path):
    source = Drawn(shape)
    found = open_source(written(source, tmp_path, plan, te, 2))
    assert_same(found, source)
    assert found.shape == source.shape


def edited(source: Source, folder: Path, edit: Callable[[dict[str, torch.Tensor], int], None]) -> Path:
    """The rank files of a source at TP 2, changed by ``edit`` of a rank's tensors and its number."""
    execute(plan_mcore(source, LayerPlacement.even(2, 1), 2, 50), folder)
    (folder / "checksums.json").unlink()
    for rank in range(2):
        file = folder / f"iter_0000001/mp_rank_0{rank}/model_optim_rng.pt"
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, weights_only=True)
        edit(content["model"], rank)
        torch.save(content, file)
    return folder


def test_packed_projections_of_mindspeed_llm(tmp_path: Path):
    """``linear_qkv`` ``[q_a; kv_a]`` whole on every rank, ``linear_qb``, ``linear_kvb``, ``k_layernorm``."""
    source = Drawn(SHAPE)

    def pack(model: dict[str, torch.Tensor], rank: int) -> None:
        for layer in range(2):
            place = f"decoder.layers.{layer}.self_attention."
            parts = [model.pop(f"{place}linear_{kind}_down_proj.weight") for kind in ("q", "kv")]
            model[f"{place}linear_qkv.weight"] = torch.cat(parts)
            for ours, theirs in (("linear_q_up_proj", "linear_qb"), ("linear_kv_up_proj", "linear_kvb")):
                model[f"{place}{theirs}.weight"] = model.pop(f"{place}{ours}.weight")
            model[f"{place}k_layernorm.weight"] = model.pop(f"{place}kv_layernorm.weight")

    assert_same(open_source(edited(source, tmp_path, pack)), source)


def test_down_projections_cut_over_ranks(tmp_path: Path):
    """As megatron-core's own layers hold them."""
    source = Drawn(SHAPE)

    def cut(model: dict[str, torch.Tensor], rank: int) -> None:
        for name in [name for name in model if "down_proj" in name]:
            model[name] = model[name].chunk(2)[rank].clone()

    found = open_source(edited(source, tmp_path, cut))
    assert_same(found, source)
    name = f"{LAYER}linear_kv_down_proj.weight"
    assert torch.equal(found.read(name, 0, [(5, 9)]), source.read(name)[5:9])


def test_split_products_of_mindspeed_llm_are_refused_by_name(tmp_path: Path):
    def split(model: dict[str, torch.Tensor], rank: int) -> None:
        model[f"{LAYER}linear_qk_nope.weight"] = model.pop(f"{LAYER}linear_q_up_proj.weight")

    with pytest.raises(
        Refused, match=r"tensors are missing: decoder\.layers\.1\.self_attention\.linear_q_up"
    ):
        open_source(edited(Drawn(SHAPE), tmp_path, split))


def test_args_that_do_not_tell_latent_attention(tmp_path: Path):
    folder = edited(Drawn(SHAPE), tmp_path, lambda model, rank: None)
    for file in folder.glob("*/*/*.pt"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, weights_only=True)
        content["args"].kv_lora_rank = None
        torch.save(content, file)
    with pytest.raises(Refused, match="args lacks kv_lora_rank of multi-latent attention"):
        open_source(folder)


def test_packed_factors_of_mindspeed_llm(tmp_path: Path):
    """An adapter on ``linear_qkv``, ``linear_qb`` and ``linear_kvb``: one A for both down projections."""
    generator = torch.Generator().manual_seed(5)
    width, heads = SHAPE.hidden_size, SHAPE.num_attention_heads

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    sizes = {
        "linear_qkv": (width, 12 + 10 + 4),
        "linear_qb": (12, heads * (6 + 4)),
        "linear_kvb": (10, heads * (6 + 8)),
    }
    drawn = {name: (draw(3, columns), draw(rows, 3)) for name, (columns, rows) in sizes.items()}

    def add(model: dict[str, torch.Tensor], rank: int) -> None:
        for layer in range(2):
            for name, (lora_a, lora_b) in drawn.items():
                place = f"decoder.layers.{layer}.self_attention.{name}"
                model[f"{place}.lora_A.default.weight"] = lora_a
                own = lora_b if name == "linear_qkv" else lora_b.chunk(2)[rank]
                model[f"{place}.lora_B.default.weight"] = own.clone()

    folder = edited(Drawn(SHAPE), tmp_path, add)
    adapter = AdapterSource(folder, SHAPE, None, LoraFlags(lora_alpha=6.0))
    assert adapter.config.r == 3
    expected = {
        "q_a_proj": (drawn["linear_qkv"][0], drawn["linear_qkv"][1][:12]),
        "kv_a_proj_with_mqa": (drawn["linear_qkv"][0], drawn["linear_qkv"][1][12:]),
        "q_b_proj": drawn["linear_qb"],
        "kv_b_proj": drawn["linear_kvb"],
    }
    assert {name.rpartition(".")[2] for name in adapter.hf_modules} == {*expected}
    for layer in range(2):
        for name, (lora_a, lora_b) in expected.items():
            found = adapter.factors(f"model.layers.{layer}.self_attn.{name}")
            assert torch.equal(found[0], lora_a) and torch.equal(found[1], lora_b), name
            assert found[2] == 2.0
