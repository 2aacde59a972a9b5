"""What a rank holds quantised: as many bytes as predicted, and nothing of it dequantised between the passes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mindspeed_lora.checkpoint.conversion.convert import convert
from mindspeed_lora.config.commands import parse
from mindspeed_lora.errors import Refused
from mindspeed_lora.parallel.groups import destroy_groups
from mindspeed_lora.quantization.shard import QuantizedWeight
from mindspeed_lora.training.dry_run import memory_question
from mindspeed_lora.training.memory import predict_memory
from tests.support.pool import WorkerPool
from tests.support.tiny import Tiny, join, open_session, plan
from tests.support.training import train_recorded


@dataclass(frozen=True)
class Held:
    """By one rank."""

    weights: int
    bytes: int
    predicted_weights: int
    predicted_bytes: int
    others: tuple[str, ...]
    """Names of parameters that are no vectors, no factors and not of the vocabulary."""


def held(words: list[str], tp: int) -> Held:
    groups = join(tp)
    try:
        session = open_session(words, groups)
        quantized = [
            module
            for chunk in session.chunks
            for module in chunk.modules()
            if isinstance(module, QuantizedWeight)
        ]
        question = memory_question(session.plan, tp, session.dtype.itemsize)
        predicted = predict_memory(question, 0).quantized
        return Held(
            sum(weight.numel() for weight in quantized),
            sum(weight.nbytes for weight in quantized),
            predicted.weights,
            predicted.bytes,
            tuple(
                p.name
                for p in session.parameters
                if p.param.dim() > 1 and not (p.is_adapter or p.is_quantized or "word" in p.name)
            ),
        )
    finally:
        destroy_groups()


@pytest.mark.parametrize(
    "flags",
    [
        {"quant_double": True},
        {"quant_type": "fp4", "quant_block_size": 32},
        {"quant_type": "int8"},
    ],
    ids=str,
)
@pytest.mark.parametrize("tp", [1, 4])
def test_bytes_are_as_predicted(workers: WorkerPool, tiny: Tiny, flags: dict[str, object], tp: int) -> None:
    words = tiny.words(qlora=True, tensor_model_parallel_size=tp, **flags)
    for rank in workers.run(tp, held, words, tp):
        assert rank.weights == rank.predicted_weights > 0
        assert rank.bytes == rank.predicted_bytes
        assert rank.others == ("output_layer.weight",)


def saved_shapes(words: list[str], tp: int) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """Shapes of all tensors that a forward pass keeps for the backward one, and of the quantised weights."""
    groups = join(tp)
    kept: set[tuple[int, ...]] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tuple(tensor.shape))
        return tensor

    try:
        session = open_session(words, groups)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            session.runner.train(session.batches.step(1), 1)
        weights = [p.param for p in session.parameters if p.is_quantized]
        return kept, {tuple(weight.shape) for weight in weights}
    finally:
        destroy_groups()


@pytest.mark.parametrize(
    "fusion",
    [
        (),
        ("--lora-fusion", "--lora-fusion-plan", "one-collective", "merge", "--lora-fusion-chunks", "2"),
        ("--lora-fusion", "--lora-fusion-plan", "overlapped"),
        ("--lora-target-modules", "linear_proj"),
    ],
    ids=str,
)
def test_nothing_dequantised_waits_for_the_backward_pass(
    workers: WorkerPool, tiny: Tiny, fusion: tuple[str, ...]
) -> None:
    words = tiny.words(qlora=True, tensor_model_parallel_size=2, sequence_parallel=True)
    for kept, weights in workers.run(2, saved_shapes, [*words, *fusion], 2):
        assert kept and len(weights) == 4
        forms = weights | {shape[::-1] for shape in weights}
        assert not kept & forms


def first_losses(words: list[str]) -> list[float]:
    return train_recorded(words).losses


def test_a_quantised_checkpoint_trains_as_one_quantised_while_loading(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path
) -> None:
    """The same losses bit for bit, from files of transformers' form and of Megatron's at another layout."""
    flags = ["--load-dir", str(tiny.model), "--qlora-nf4", "--quant-double"]
    convert(parse("convert", [*flags, "--save-dir", str(tmp_path / "hf"), "--save-model-type", "hf"]))
    megatron = ["--save-dir", str(tmp_path / "mg"), "--save-model-type", "mg"]
    convert(parse("convert", [*flags, *megatron, "--target-tensor-parallel-size", "4"]))
    common = {"train_iters": 2, "qlora": True, "tensor_model_parallel_size": 2}
    (expected, _) = workers.run(2, first_losses, tiny.words(quant_double=True, **common))
    for folder in (tmp_path / "hf" / "mg2hf", tmp_path / "mg"):
        words = tiny.words(load=folder, **common)
        assert workers.run(2, first_losses, words) == [expected, expected]
        with pytest.raises(
            Refused, match=r"holds quantised weights \(nf4, blocks of 64, nested statistics\)"
        ):
            plan(tiny.words(load=folder))
