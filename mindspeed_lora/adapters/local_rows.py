"""Where the rows of a fused linear's matrices stand in a rank's shard of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mindspeed_lora.adapters.side_branch import RowBlock
from mindspeed_lora.adapters.spec import PartSpec
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.models.families import FAMILIES
from mindspeed_lora.models.families.segments import Segment


def local_rows(spec: PartSpec, shape: ModelShape, local_size: int, tp_size: int) -> RowBlock:
    """The rows of a TP rank's shard, of ``local_size`` rows, that a pair of factors adds to."""
    if not spec.label:
        return RowBlock(0, local_size)
    weight = spec.weight
    mapping, layer = FAMILIES[shape.family].mapping(weight)
    segments = local_segments(weight, shape, local_size, tp_size)
    return _row_block(segments, mapping.modules(layer).index(spec.hf_modules[0]))


def local_segments(name: str, shape: ModelShape, local_size: int, tp_size: int) -> list[Segment]:
    """Rows of the Hugging Face tensors in a TP rank's shard: it holds whole query groups, as a smaller model does."""
    local_shape = dataclasses.replace(
        shape,
        num_attention_heads=shape.num_attention_heads // tp_size,
        num_query_groups=shape.num_query_groups // tp_size,
    )
    return FAMILIES[shape.family].mapping(name)[0].segments(local_shape, local_size)


def length(segment: Segment) -> int:
    """Rows of a segment."""
    return segment.stop - segment.start


def _row_block(segments: Sequence[Segment], part: int) -> RowBlock:
    """Where the rows of one part of a fused matrix stand in it."""
    places, position = [], 0
    for segment in segments:
        count = length(segment)
        if segment.part == part:
            places.append((position, position + count))
        position += count
    (start, stop), *others = places
    stride = others[0][0] - start if others else 0
    block = RowBlock(start, stop, len(places), stride)
    assert all(place == (start + i * stride, stop + i * stride) for i, place in enumerate(places))
    return block
