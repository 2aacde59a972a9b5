from __future__ import annotations

import re
from typing import Any

import pytest

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.stages import LayerPlacement, ModelChunk
from mindspeed_lora.errors import Refused


def placement(num_layers: int, pp: int, **flags: Any) -> LayerPlacement:
    return LayerPlacement.of(num_layers, ParallelConfig(pipeline_model_parallel_size=pp, **flags))


@pytest.mark.parametrize(
    ("num_layers", "pp", "flags", "chunks"),
    [
        (4, 1, {}, "0123"),
        (4, 1, {"num_layer_list": "4"}, "0123"),
        (8, 4, {}, "01 23 45 67"),
        (8, 4, {"num_layer_list": "3,2,2,1"}, "012 34 56 7"),
        (6, 3, {"decoder_first_pipeline_num_layers": 2}, "01 23 45"),
        (7, 3, {"decoder_first_pipeline_num_layers": 1}, "0 123 456"),
        (7, 3, {"decoder_last_pipeline_num_layers": 1}, "012 345 6"),
        (
            8,
            4,
            {"decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 3},
            "0 12 34 567",
        ),
        (5, 2, {"decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 4}, "0 1234"),
        (6, 2, {"noop_layers": "0,7"}, "-012 345-"),
        (6, 2, {"noop_layers": "5,3"}, "012- 3-45"),
        (3, 2, {"noop_layers": "0", "num_layer_list": "1,3"}, "- 012"),
        (8, 2, {"num_layers_per_virtual_pipeline_stage": 2}, "01 23 45 67"),
        (8, 2, {"num_virtual_stages_per_pipeline_rank": 4}, "0 1 2 3 4 5 6 7"),
        (6, 2, {"num_virtual_stages_per_pipeline_rank": 2, "noop_layers": "6,7"}, "01 23 45 --"),
        (
            8,
            2,
            {"num_virtual_stages_per_pipeline_rank": 2, "decoder_first_pipeline_num_layers": 2},
            "0 123 4 567",
        ),
    ],
)
def test_layers_of_every_chunk(num_layers: int, pp: int, flags: dict[str, Any], chunks: str) -> None:
    found = placement(num_layers, pp, **flags)
    texts = ["".join("-" if layer is None else str(layer) for layer in chunk) for chunk in found.chunks]
    assert " ".join(texts) == chunks
    assert found.vp_size * pp == len(found.chunks)
    layers = [layer for rank in range(pp) for chunk in found.rank_chunks(rank) for layer in chunk.layers]
    assert sorted(layers) == list(range(num_layers))


def test_chunks_of_a_rank_are_ordered_by_virtual_stage() -> None:
    found = placement(8, 2, num_virtual_stages_per_pipeline_rank=2)
    assert found.rank_chunks(1) == (
        ModelChunk((2, 3), vp_stage=0, is_first=False, is_last=False),
        ModelChunk((6, 7), vp_stage=1, is_first=False, is_last=True),
    )
    assert found.rank_chunks(0)[0] == ModelChunk((0, 1), is_last=False)
    assert found.is_even and found.num_slots == 8 and not found.noop_slots
    assert placement(4, 1).chunk(0) == ModelChunk.whole(4)


def test_no_ops() -> None:
    found = placement(4, 2, noop_layers="5,0")
    assert (found.num_slots, found.noop_slots) == (6, (0, 5))
    assert found.chunk(0).slots == (None, 0, 1) and found.chunk(0).layers == (0, 1)
    assert found.describe() == "0-1 + 1 no-op, 2-3 + 1 no-op"


def test_a_description_for_people() -> None:
    assert placement(8, 2, num_virtual_stages_per_pipeline_rank=2).describe() == "0-1 and 4-5, 2-3 and 6-7"
    assert placement(3, 2, num_layer_list="2,1").describe() == "0-1, 2"
    assert placement(2, 2, noop_layers="0,1").describe() == "2 no-op, 0-1"


@pytest.mark.parametrize(
    ("num_layers", "pp", "flags", "message"),
    [
        (
            7,
            2,
            {},
            "--pipeline-model-parallel-size 2 does not divide the model's 7 layers; use 1 or 7, or give",
        ),
        (6, 4, {"noop_layers": "1"}, "the model's 7 layers (1 of them no-ops)"),
        (8, 2, {"num_layer_list": "4,3"}, "--num-layer-list 4,3 adds up to 7, but the model has 8 layers"),
        (8, 2, {"num_layer_list": "4,2,2"}, "has 3 stages, but --pipeline-model-parallel-size is 2"),
        (8, 2, {"noop_layers": "1,10"}, "8 layers and 2 no-ops, so places go from 0 to 9"),
        (
            8,
            2,
            {"num_layers_per_virtual_pipeline_stage": 3},
            "does not divide the 4 layers of a pipeline rank",
        ),
        (
            8,
            2,
            {"num_virtual_stages_per_pipeline_rank": 3},
            "does not divide the 4 layers of pipeline rank 0",
        ),
        (
            8,
            2,
            {"decoder_last_pipeline_num_layers": 6, "num_virtual_stages_per_pipeline_rank": 3},
            "3 does not divide the 2 layers of pipeline rank 0; use 1 or 2",
        ),
        (
            8,
            2,
            {"num_layer_list": "4,4", "num_layers_per_virtual_pipeline_stage": 1},
            "--num-layer-list 4,4 and --num-layers-per-virtual-pipeline-stage 1 both say",
        ),
        (
            8,
            2,
            {"num_virtual_stages_per_pipeline_rank": 4, "num_layers_per_virtual_pipeline_stage": 1},
            "both say how layers fall into stages; give one",
        ),
        (
            8,
            2,
            {"num_layer_list": "4,4", "decoder_first_pipeline_num_layers": 4},
            "--num-layer-list 4,4 and --decoder-first-pipeline-num-layers 4 both say",
        ),
        (
            8,
            2,
            {"decoder_first_pipeline_num_layers": 2, "num_layers_per_virtual_pipeline_stage": 1},
            "give --num-virtual-stages-per-pipeline-rank instead",
        ),
        (
            8,
            1,
            {"num_layers_per_virtual_pipeline_stage": 2},
            "needs --pipeline-model-parallel-size of at least 2",
        ),
        (8, 1, {"decoder_last_pipeline_num_layers": 8}, "needs --pipeline-model-parallel-size of at least 2"),
        (
            8,
            3,
            {"decoder_first_pipeline_num_layers": 3},
            "--decoder-first-pipeline-num-layers 3 leaves 5 of the model's 8 layers for 2 other stages",
        ),
        (
            8,
            3,
            {"decoder_first_pipeline_num_layers": 8},
            "leaves 0 of the model's 8 layers for 2 other stages",
        ),
        (
            8,
            2,
            {"decoder_first_pipeline_num_layers": 4, "decoder_last_pipeline_num_layers": 3},
            "leave 1 of the model's 8 layers for 0 other stages",
        ),
    ],
)
def test_what_cannot_be(num_layers: int, pp: int, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=re.escape(message)):
        placement(num_layers, pp, **flags)


@pytest.mark.parametrize(
    "flags",
    [{"num_layer_list": text} for text in ("", "a", "4,,4", "0,8", "-1")]
    + [{"noop_layers": text} for text in ("", "x", "1,1", "-1")],
)
def test_values_that_are_no_lists_of_numbers(flags: dict[str, str]) -> None:
    with pytest.raises(Refused, match="separated by commas"):
        ParallelConfig(**flags)
