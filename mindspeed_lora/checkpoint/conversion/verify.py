"""``convert_ckpt.py verify A [B]``: whether two checkpoints of any formats and layouts hold the same.

The checksums that a folder keeps are checked first; then models are compared by canonical name, adapters by PEFT's
names and by how each module is scaled. The exit status is 0 for ``equal`` and ``within tolerance``, else 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mindspeed_lora.checkpoint.canonical import VOCABULARY_TENSORS
from mindspeed_lora.checkpoint.conversion.compare import (
    Difference,
    Tensors,
    compare,
    compare_rows,
    row_pieces,
)
from mindspeed_lora.checkpoint.conversion.verify_checksums import check_sums
from mindspeed_lora.checkpoint.conversion.verify_result import Comparison, Result, result_json, result_lines
from mindspeed_lora.checkpoint.conversion.verify_sides import (
    ADAPTER,
    MODEL,
    AdapterTensors,
    ModelTensors,
    Side,
    open_side,
)
from mindspeed_lora.checkpoint.storage.manifest import MANIFEST_FILE
from mindspeed_lora.config.jobs import VerifyJob
from mindspeed_lora.errors import Refused


def verify(job: VerifyJob) -> int:
    """Check checksums, compare, print, and give the exit status.

    Raises:
        Refused: a folder is no checkpoint, or one is a model and the other an adapter.
    """
    config = job.verify
    paths = [Path(path) for path in (config.first, config.second) if path is not None]
    checks = [check_sums(path) for path in paths]
    if len(paths) == 1 and checks[0].folder is None:
        raise Refused(
            f"verify {paths[0]}: keeps no {MANIFEST_FILE} to check; name a second checkpoint to compare it with."
        )
    found = None
    if not any(check.damage for check in checks):
        sides = [open_side(path) for path in paths]
        found = compare_sides(sides) if len(sides) > 1 else Comparison([side.describe() for side in sides])
    result = Result(paths, checks, found, config.tolerance)
    text = json.dumps(result_json(result), indent=2, ensure_ascii=False) if config.json else None
    print(text or "\n".join(result_lines(result)), flush=True)
    return result.status


def compare_sides(sides: Sequence[Side]) -> Comparison:
    """Compare what two folders hold of models and adapters."""
    one, other = sides
    common = [part for part in (MODEL, ADAPTER) if part in one.parts and part in other.parts]
    if not common:
        first, second = (f"{side.path} is {_kind(side)}" for side in sides)
        raise Refused(
            f"verify: {first}, and {second}; compare models with models and adapters with adapters, or merge "
            "the adapter first."
        )
    found = Comparison([side.describe() for side in sides])
    for letter, side in zip("AB", sides, strict=True):
        left_out = [part for part in side.parts if part not in common]
        found.notes += [f"{letter}'s {part} is not compared: the other side has none" for part in left_out]
    for part in common:
        _compare_part(found, one.parts[part], other.parts[part])
    return found


def _kind(side: Side) -> str:
    return "an adapter" if ADAPTER in side.parts else "a model"


def _compare_part(
    found: Comparison, one: ModelTensors | AdapterTensors, other: ModelTensors | AdapterTensors
) -> None:
    for _, difference in compare(one, other):
        found.num_tensors += 1
        if difference is not None and difference.shapes is not None:
            difference = _without_padding(found, one, other, difference)
        if difference is not None:
            found.differences.append(difference)
    if isinstance(one, AdapterTensors) and isinstance(other, AdapterTensors):
        found.scalings += _scalings(one, other)


def _without_padding(
    found: Comparison, one: Tensors, other: Tensors, difference: Difference
) -> Difference | None:
    """The difference of a vocabulary tensor within the rows that both have, where the others are zero padding.

    Only a side that nothing but its own files tells the vocabulary may be padded.
    """
    name, sizes = difference.name, [side.shape(difference.name) for side in (one, other)]
    padded = max((one, other), key=lambda side: side.shape(name)[0])
    rows = min(size[0] for size in sizes)
    if (
        name not in VOCABULARY_TENSORS
        or sizes[0][1:] != sizes[1][1:]
        or not isinstance(padded, ModelTensors)
        or not padded.may_be_padded
    ):
        return difference
    total = padded.shape(name)[0]
    for start, stop in row_pieces((total - rows, *sizes[0][1:]), padded.dtype(name).itemsize):
        if padded.rows(name, rows + start, rows + stop).count_nonzero():
            return difference
    found.notes.append(
        f"{name}: {total} and {rows} rows; those from {rows} on are zeros that pad the vocabulary"
    )
    return compare_rows(one, other, name, rows)


def _scalings(one: AdapterTensors, other: AdapterTensors) -> list[str]:
    """The modules with factors on both sides that the sides' configurations scale otherwise."""
    modules = [
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for name in one.names()
        if name.endswith(".lora_A.weight") and name in set(other.names())
    ]
    pairs = [(module, one.config.scaling_of(module), other.config.scaling_of(module)) for module in modules]
    return [
        f"{module}: scaled by {first:g} and {second:g}" for module, first, second in pairs if first != second
    ]
