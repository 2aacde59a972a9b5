"""MindSpeed-LLM's factors of experts in Megatron files, single and grouped, written by code of the test's own."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.checkpoint.peft.source import AdapterSource
from mindspeed_lora.config.lora import LoraFlags
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from tests.support.megatron_files import Tensors, columns, gate_up
from tests.support.moe_models import EXPERTS, HIDDEN, LAYERS, WIDTH, moe_model

RANK, ALPHA = 3, 12
"""Rank and alpha of all factors; 3 divides none of the sizes, so that no wrong view fits by chance."""


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    extended: bool = False
    """MindSpeed-LLM's --moe-tp-extend-ep: the tensor-parallel ranks share the experts."""


LAYOUTS = [
    Layout(),
    Layout(ep=2),
    Layout(tp=2, etp=2),
    Layout(tp=2, pp=2, ep=2, etp=1),
    Layout(tp=2, pp=2, ep=2, etp=2),
    Layout(tp=2, ep=2, extended=True),
]


def factors_of(layer: int, expert: int) -> dict[str, torch.Tensor]:
    """Factors of one expert under PEFT's names; gate and up have one A."""
    generator = torch.Generator().manual_seed(100 * layer + expert)
    sizes = {"fc1_a": (RANK, HIDDEN), "gate_b": (WIDTH, RANK), "up_b": (WIDTH, RANK)}
    sizes |= {"fc2_a": (RANK, WIDTH), "fc2_b": (HIDDEN, RANK)}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def of_layer(layer: int, layout: Layout, tp_rank: int, ep_rank: int, grouped: bool) -> Tensors:
    """One layer's factors in one rank's file, by names within the layer."""
    blocks = layout.ep * (layout.tp if layout.extended else 1)
    block = ep_rank * layout.tp + tp_rank if layout.extended else ep_rank
    etp = 1 if layout.extended else layout.etp
    own = [
        factors_of(layer, expert)
        for expert in range(block * EXPERTS // blocks, (block + 1) * EXPERTS // blocks)
    ]
    rank = tp_rank % etp
    fc1_a, fc2_b = [one["fc1_a"] for one in own], [one["fc2_b"] for one in own]
    fc1_b = [gate_up(one["gate_b"], one["up_b"], rank, etp) for one in own]
    fc2_a = [columns(one["fc2_a"], rank, etp) for one in own]
    if not grouped:
        kinds = {
            "linear_fc1.lora_A": fc1_a,
            "linear_fc1.lora_B": fc1_b,
            "linear_fc2.lora_A": fc2_a,
            "linear_fc2.lora_B": fc2_b,
        }
        return {
            f"local_experts.{number}.{kind}.default.weight": value
            for kind, values in kinds.items()
            for number, value in enumerate(values)
        }
    # A buffer [E, in, r] or [E, r, out] reinterpreted as a matrix, as the grouped experts keep it.
    stacked = {
        "weight1_lora_a": (fc1_a, (HIDDEN, -1)),
        "weight1_lora_b": (fc1_b, (RANK, -1)),
        "weight2_lora_a": (fc2_a, (-1, RANK)),
        "weight2_lora_b": (fc2_b, (-1, HIDDEN)),
    }
    return {
        name: torch.stack([value.t() for value in values]).contiguous().view(size)
        for name, (values, size) in stacked.items()
    }


def write(folder: Path, layout: Layout, grouped: bool) -> Path:
    """A filtered checkpoint with the experts' factors alone."""
    args = argparse.Namespace(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        moe_tp_extend_ep=layout.extended,
        lora_r=RANK,
        lora_alpha=ALPHA,
    )
    size = LAYERS // layout.pp
    for tp_rank in range(layout.tp):
        for pp_rank in range(layout.pp):
            for ep_rank in range(layout.ep):
                model: Tensors = {}
                for local in range(size):
                    own = of_layer(pp_rank * size + local, layout, tp_rank, ep_rank, grouped)
                    model |= {
                        f"decoder.layers.{local}.mlp.experts.{key}": value for key, value in own.items()
                    }
                name = f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if layout.pp > 1 else "")
                name += f"_{ep_rank:03d}" if layout.ep > 1 else ""
                path = folder / "iter_0000001" / name / "model_optim_rng.pt"
                path.parent.mkdir(parents=True)
                content = {"checkpoint_version": 3.0, "iteration": 1, "args": args, "model": model}
                torch.save(content, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    return folder


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return shape_of(moe_model("mixtral", tmp_path_factory.mktemp("moe") / "mixtral"))


@pytest.mark.parametrize("grouped", [False, True], ids=["single", "grouped"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_experts_factors_of_every_layout(
    layout: Layout, grouped: bool, shape: ModelShape, tmp_path: Path
):
    source = AdapterSource(write(tmp_path / "mg", layout, grouped), shape)
    assert source.shared == {"experts.linear_fc1"} and source.spec.parts[0].scaling == ALPHA / RANK
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            own = factors_of(layer, expert)
            module = f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}"
            expected = {
                "linear_fc1.lora_a": own["fc1_a"],
                "linear_fc1.lora_b": torch.cat([own["gate_b"], own["up_b"]]),
                "linear_fc2.lora_a": own["fc2_a"],
                "linear_fc2.lora_b": own["fc2_b"],
            }
            for name, value in expected.items():
                assert torch.equal(source.read(f"{module}.{name}"), value)
            place = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            assert torch.equal(source.factors(f"{place}.w3")[1], own["up_b"])


def test_ranks_that_trained_apart_are_refused(shape: ModelShape, tmp_path: Path):
    """MindSpeed-LLM's grouped A of fc1 is not kept together over expert-tensor-parallel ranks."""
    folder = write(tmp_path / "mg", Layout(tp=2, etp=2), grouped=True)
    path = folder / "iter_0000001" / "mp_rank_01" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["model"]["decoder.layers.0.mlp.experts.weight1_lora_a"][0, 0] += 1
    torch.save(content, path)
    with pytest.raises(Refused, match=r"local_experts\.0\.linear_fc1\.lora_a differs from that of"):
        AdapterSource(folder, shape, lora=LoraFlags())


def test_a_missing_rank_is_named(shape: ModelShape, tmp_path: Path):
    folder = write(tmp_path / "mg", Layout(ep=2), grouped=False)
    for file in (folder / "iter_0000001" / "mp_rank_00_001").iterdir():
        file.unlink()
    (folder / "iter_0000001" / "mp_rank_00_001").rmdir()
    with pytest.raises(Refused, match="expert_model_parallel_size is 2"):
        AdapterSource(folder, shape)


def test_a_stack_of_another_size_is_refused(shape: ModelShape, tmp_path: Path):
    folder = write(tmp_path / "mg", Layout(), grouped=True)
    path = folder / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    name = "decoder.layers.0.mlp.experts.weight2_lora_b"
    content["model"][name] = content["model"][name][:-1].clone()
    torch.save(content, path)
    with pytest.raises(Refused, match="weight2_lora_b: shape .* does not stack 4 experts"):
        AdapterSource(folder, shape)
