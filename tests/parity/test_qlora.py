"""QLoRA trains as in transformers, PEFT and bitsandbytes, however the model is cut: the same weights, bit for bit.

bitsandbytes dequantises to the very same numbers, so that what is left is the rounding of fp32 sums, as without
quantisation: the usual tolerances. Experts, int8 and other block sizes than 64, which transformers cannot quantise or
computes otherwise, are compared with a plain model of transformers over weights that bitsandbytes quantised and
dequantised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mindspeed_lora.checkpoint.conversion.convert import convert
from mindspeed_lora.config.commands import parse
from mindspeed_lora.quantization.shard import QuantizedWeight
from tests.support.differences import Differences
from tests.support.layouts import Layout
from tests.support.parity import Case, ParityBench
from tests.support.quantized import Quant, quantized_shards
from tests.support.reference import Recipe, Reference
from tests.support.shards import assemble
from tests.support.training import Breakage

NESTED = Quant(double=True)
DENSE = Case(quant=NESTED)
EXPERTS = Case(model="mixtral", quant=Quant(double=True, by_library=False))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        pytest.param(Layout(tp=2), marks=pytest.mark.slow),
        Layout(tp=2, sequence_parallel=True, recompute="uniform"),
        pytest.param(Layout(tp=4, fusion="fused"), marks=pytest.mark.slow),
        Layout(tp=2, sequence_parallel=True, fusion="chunks"),
        pytest.param(Layout(tp=2, sequence_parallel=True, fusion="merged"), marks=pytest.mark.slow),
        pytest.param(Layout(tp=2, sequence_parallel=True, fusion="published"), marks=pytest.mark.slow),
        pytest.param(Layout(tp=2, pp=2, recompute="selective"), marks=pytest.mark.slow),
        Layout(pp=2, vpp=2, distributed_optimizer=True),
        pytest.param(
            Layout(dp=2, cp=2, attention="ring", distributed_optimizer=True), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_every_cut_is_exact(
    layout: Layout, bench: ParityBench, within: Callable[[Differences], None]
) -> None:
    within(bench.compare(DENSE, bench.train(DENSE, layout)))


@pytest.mark.parametrize("model", ["llama", "phi3"])
def test_every_cut_holds_the_numbers_of_bitsandbytes(model: str, bench: ParityBench) -> None:
    """Rows of 48 numbers in blocks of 64: every cut goes through blocks. The last one reads a Megatron checkpoint."""
    case, megatron = Case(model=model, quant=NESTED), bench.new_folder()
    words = f"--load-dir {bench.model(model)} --save-dir {megatron} --save-model-type mg"
    convert(parse("convert", [*words.split(), "--target-tensor-parallel-size", "2"]))
    expected = Reference(bench.model(model), quant=NESTED).linears()
    for layout, more in (
        (Layout(), ()),
        (Layout(tp=2), ()),
        (Layout(tp=4), ()),
        (Layout(pp=2, vpp=2), ()),
        (Layout(tp=4), ("--load", str(megatron))),
    ):
        argv = [*bench.flags(case), "--lora-r", "4", *layout.flags, *more]
        found = assemble(bench.workers.run(layout.world_size, quantized_shards, argv))
        assert found.keys() == expected.keys()
        for name, weight in found.items():
            assert torch.equal(weight.view(torch.int32), expected[name].view(torch.int32)), (layout, name)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(quant=Quant()), marks=pytest.mark.slow),
        Case(quant=Quant("fp4", double=True)),
        pytest.param(Case(quant=Quant("nf4", 128, by_library=False)), marks=pytest.mark.slow),
        Case(quant=Quant("int8", by_library=False)),
        pytest.param(Case(model="llama-bias", quant=NESTED), marks=pytest.mark.slow),
        # Packed q, k and v, and gate and up, are each one matrix with its own blocks.
        Case(model="phi3", quant=NESTED),
        # Linears that are not cut, with an adapter (linear_q_down_proj) and without one (linear_kv_down_proj).
        pytest.param(
            Case(
                model="deepseek-v3",
                quant=NESTED,
                targets=("linear_q_down_proj", "linear_kv_up_proj", "linear_proj"),
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda case: f"{case.model}-{case.quant}",
)
def test_every_kind_is_exact(case: Case, bench: ParityBench, within: Callable[[Differences], None]) -> None:
    layout = Layout(tp=2, sequence_parallel=True)
    within(bench.compare(case, bench.train(case, layout)))


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sequence_parallel=True)], ids=str)
def test_linears_without_an_adapter(
    layout: Layout, bench: ParityBench, within: Callable[[Differences], None]
) -> None:
    case = replace(DENSE, targets=("linear_proj",))
    within(bench.compare(case, bench.train(case, layout)))


@pytest.mark.parametrize(
    ("layout", "flags"),
    [
        (Layout(dp=2), "--expert-model-parallel-size 2"),
        pytest.param(Layout(tp=2, sequence_parallel=True, recompute="uniform"), "", marks=pytest.mark.slow),
        (
            Layout(tp=2, dp=2, sequence_parallel=True),
            "--expert-model-parallel-size 2 --expert-tensor-parallel-size 2",
        ),
        pytest.param(
            Layout(pp=2, dp=2),
            "--expert-model-parallel-size 2 --moe-alltoall-overlap-comm",
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_experts_are_exact(
    layout: Layout, flags: str, bench: ParityBench, within: Callable[[Differences], None]
) -> None:
    within(bench.compare(EXPERTS, bench.train(EXPERTS, layout, flags.split())))


def take_the_statistics_of_the_block_before(session: Any) -> None:
    """Every block that is not a shard's first is dequantised by the magnitude of the one before it."""
    for weight in _quantised(session):
        weight.statistics.copy_(weight.statistics.roll(1))


def take_the_mean_of_what_is_held(session: Any) -> None:
    """The offset of nested statistics is that of the shard's part, not of the whole matrix: 1% off."""
    for weight in _quantised(session):
        weight.nested[1] *= 1.01


def _quantised(session: Any) -> list[Any]:
    return [
        module
        for chunk in session.chunks
        for module in chunk.modules()
        if isinstance(module, QuantizedWeight)
    ]


@pytest.mark.parametrize("breakage", [take_the_statistics_of_the_block_before, take_the_mean_of_what_is_held])
def test_wrong_statistics_are_found(breakage: Breakage, bench: ParityBench) -> None:
    case = replace(DENSE, recipe=Recipe(steps=3, warmup_iters=0))
    outcome = bench.train(case, Layout(tp=2), breakage=breakage)
    with pytest.raises(AssertionError, match="above tolerance: logits, loss, grad_norm, gradient"):
        bench.compare(case, outcome).check()
