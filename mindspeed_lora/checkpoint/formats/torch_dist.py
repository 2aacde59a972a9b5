"""Reading megatron-core's distributed checkpoints (``torch_dist``) without process groups.

An iteration's folder holds ``common.pt`` (``args`` and the like), ``.metadata`` (which chunks make up which tensor)
and the chunks in ``*.distcp`` files. However the model was cut when it was saved, a chunk is a box of rows, columns
and layers; a read fetches the wanted part of each box that it meets.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

import torch

from mindspeed_lora.checkpoint.canonical import EMBEDDING, OUTPUT_LAYER, VOCABULARY_TENSORS
from mindspeed_lora.checkpoint.formats.hf import WEIGHT_DTYPES, origin_of
from mindspeed_lora.checkpoint.formats.iteration import LATEST_FILE, latest_iteration
from mindspeed_lora.checkpoint.formats.mcore import megatron_shape
from mindspeed_lora.checkpoint.formats.model_files import kept_hf_config, kept_origin
from mindspeed_lora.checkpoint.formats.torch_dist_names import (
    STACKED,
    Place,
    canonical_name,
    is_adapter,
    is_weight,
    place_of,
)
from mindspeed_lora.checkpoint.messages import first_few
from mindspeed_lora.checkpoint.source import CheckpointSource, StoredPart
from mindspeed_lora.checkpoint.storage.dcp_metadata import (
    METADATA_FILE,
    Chunk,
    StoredTensor,
    read_metadata,
)
from mindspeed_lora.checkpoint.storage.distcp_file import DistcpFiles
from mindspeed_lora.checkpoint.storage.manifest import manifest_folder
from mindspeed_lora.checkpoint.storage.pt_file import PtFile
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families.segments import Range

COMMON_FILE = "common.pt"
BACKEND_FILE = "metadata.json"
BACKEND = "torch_dist"


def find_iteration(path: Path) -> Path | None:
    """The folder with a distributed checkpoint that a path means, or None where there is none."""
    folder = latest_iteration(path) if (path / LATEST_FILE).is_file() else path
    if _is_distributed(folder):
        return folder
    iterations = sorted(path.glob("iter_*"))
    if len(iterations) == 1 and _is_distributed(iterations[0]):
        return iterations[0]
    return None


def _is_distributed(folder: Path) -> bool:
    backend = folder / BACKEND_FILE
    if backend.is_file():
        try:
            told = json.loads(backend.read_text(encoding="utf-8"))["sharded_backend"]
        except (ValueError, KeyError, TypeError):
            told = None
        if isinstance(told, str) and told != BACKEND:
            raise Refused(
                f"{backend}: the checkpoint's format is {told}, which is not supported; supported are torch_dist "
                "and torch."
            )
    return (folder / METADATA_FILE).is_file() or next(folder.glob("*.distcp"), None) is not None


@dataclass(frozen=True)
class Box:
    """What a chunk holds of one canonical tensor."""

    ranges: tuple[Range, ...]
    """Per axis of the canonical tensor."""
    whole: tuple[int, ...]
    """Shape of the canonical tensor, with the padded vocabulary."""
    key: str
    """The stored tensor's key."""
    dtype: torch.dtype
    chunk: Chunk
    index: int
    """Which of the chunk's layers, or of their experts, it is."""


class TorchDistSource(CheckpointSource):
    """A distributed checkpoint read by canonical names."""

    def __init__(self, path: Path, config_dir: Path | None = None, checking: bool = True) -> None:
        folder = find_iteration(path)
        if folder is None:
            raise Refused(f"{path}: no distributed checkpoint; expected {METADATA_FILE} and *.distcp files.")
        self.folder = folder
        self.manifest_folder = manifest_folder(folder) if checking else None
        common = PtFile(folder / COMMON_FILE, checking)
        metadata = read_metadata(folder, is_weight)
        self.boxes = _boxes(metadata.tensors)
        """Canonical name → the chunks of the tensor."""
        self.has_unmerged_adapter = any(is_adapter(key) for key in metadata.keys)
        """Whether LoRA factors lie beside the base, which are not read here."""
        kept = kept_hf_config(folder)
        origin = kept_origin(kept) if kept else origin_of(config_dir) if config_dir else None
        config_dir = config_dir or kept
        args = common.content.get("args") if isinstance(common.content, dict) else None
        shape = megatron_shape(args, self.boxes, common.path, config_dir)
        super().__init__(path, shape, origin, config_dir)
        self._check_tensors()
        self.files = DistcpFiles(folder, checking)
        self.files.check((box.key, box.chunk) for name in self.tensors for box in self.boxes[name])
        self.shape = dataclasses.replace(shape, params_dtype=WEIGHT_DTYPES[self.dtype(EMBEDDING)])

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a canonical tensor is stored in."""
        return self.boxes[name][0].dtype

    def parts(self, name: str) -> list[StoredPart]:
        """The chunks of a canonical tensor, each as its part of it."""
        return [
            StoredPart(
                box.key,
                self.folder / box.chunk.file,
                box.dtype,
                tuple(stop - start for start, stop in box.ranges),
            )
            for box in self.boxes[name]
        ]

    def _fill(self, out: torch.Tensor, name: str, wanted: Sequence[Sequence[Range]]) -> None:
        for box in self.boxes[name]:
            for region, place in _overlaps(box, wanted):
                view = out[tuple(slice(*one) for one in place)]
                self.files.read_into(view, box.key, box.dtype, box.chunk, box.index, region)

    def _check_tensors(self) -> None:
        """Compare the tensors with the architecture: names, shapes, dtypes."""
        path = self.folder / METADATA_FILE
        missing = [name for name in self.tensors if name not in self.boxes]
        tied = not self.shape.untie_embeddings_and_output_weights
        extra = [
            name for name in self.boxes if name not in self.tensors and not (tied and name == OUTPUT_LAYER)
        ]
        for names, problem in ((missing, "missing"), (extra, "not known in a model of this shape")):
            if names:
                raise Refused(f"{path}: tensors are {problem}: {first_few(names)}.")
        for name, full in self.tensors.items():
            boxes = self.boxes[name]
            _check_whole(path, name, boxes, full)
            if boxes[0].dtype not in WEIGHT_DTYPES or any(box.dtype != boxes[0].dtype for box in boxes):
                raise Refused(
                    f"{path}: {name} has dtype {boxes[0].dtype}, or several; expected one of "
                    f"{', '.join(WEIGHT_DTYPES.values())}."
                )


def _boxes(tensors: dict[str, StoredTensor]) -> dict[str, list[Box]]:
    """The chunks of each canonical tensor. A layer's number that no tensor has is a no-op layer."""
    found: dict[tuple[str, int | None, int | None], list[Box]] = defaultdict(list)
    for key, tensor in tensors.items():
        place = place_of(key)
        whole, first = tensor.size[place.num_stacked :], 0
        if place.half is not None and whole:
            first, whole = place.half * whole[0], (2 * whole[0], *whole[1:])
        for chunk in tensor.chunks:
            starts = [first, *(0 for _ in whole[1:])]
            spans = zip(starts, chunk.offsets[-len(whole) :], chunk.sizes[-len(whole) :], strict=False)
            ranges = tuple((start + offset, start + offset + size) for start, offset, size in spans)
            for layer, expert, index in _members(place, chunk):
                found[place.name, layer, expert].append(Box(ranges, whole, key, tensor.dtype, chunk, index))
    layers = sorted({layer for _, layer, _ in found if layer is not None})
    numbers: dict[int | None, int | None] = {layer: number for number, layer in enumerate(layers)}
    return {
        canonical_name(name, numbers.get(layer), expert): boxes
        for (name, layer, expert), boxes in found.items()
    }


def _members(place: Place, chunk: Chunk) -> Iterator[tuple[int | None, int | None, int]]:
    """The numbers of each layer and expert that a chunk holds, and its index in the chunk."""
    axis, numbers = 0, []
    for number in (place.layer, place.expert):
        if number == STACKED and axis < len(chunk.sizes):
            first, count = chunk.offsets[axis], chunk.sizes[axis]
            numbers.append(range(first, first + count))
            axis += 1
        else:
            numbers.append([] if number == STACKED else [number])  # type: ignore[arg-type]
    for index, (layer, expert) in enumerate(product(*numbers)):
        yield layer, expert, index


def _check_whole(path: Path, name: str, boxes: Sequence[Box], full: tuple[int, ...]) -> None:
    """Refuse chunks that are not exactly a tensor of the expected shape."""
    whole = boxes[0].whole
    padded = name in VOCABULARY_TENSORS and len(whole) == len(full) and whole[0] > full[0]
    if any(box.whole != whole for box in boxes) or (whole != full and not (padded and whole[1:] == full[1:])):
        raise Refused(f"{path}: {name} has shape {list(whole)}; expected {list(full)}.")
    held = sum(prod(stop - start for start, stop in box.ranges) for box in boxes)
    sweep = sorted(boxes, key=lambda box: box.ranges)
    for number, box in enumerate(sweep):
        for other in sweep[number + 1 :]:
            if other.ranges[0][0] >= box.ranges[0][1]:
                break
            if all(
                one[0] < two[1] and two[0] < one[1] for one, two in zip(box.ranges, other.ranges, strict=True)
            ):
                raise Refused(
                    f"{path}: the chunks of {name} at {_text(box)} and {_text(other)} overlap; the checkpoint is "
                    "damaged."
                )
    if held != prod(whole):
        raise Refused(
            f"{path}: the chunks of {name} hold {held} of its {prod(whole)} values; some are missing."
        )


def _text(box: Box) -> str:
    return " × ".join(f"{start}:{stop}" for start, stop in box.ranges)


def _overlaps(
    box: Box, wanted: Sequence[Sequence[Range]]
) -> Iterator[tuple[tuple[Range, ...], tuple[Range, ...]]]:
    """Where a box meets the wanted ranges: the region within its chunk, and the place in what was asked for."""
    axes = [list(_meet(span, ranges)) for span, ranges in zip(box.ranges, wanted, strict=True)]
    for first in axes[0]:
        for rest in axes[1] if len(axes) > 1 else [None]:
            both = [first] if rest is None else [first, rest]
            yield tuple(inside for inside, _ in both), tuple(place for _, place in both)


def _meet(span: Range, ranges: Sequence[Range]) -> Iterator[tuple[Range, Range]]:
    at = 0
    for start, stop in ranges:
        first, last = max(start, span[0]), min(stop, span[1])
        if first < last:
            yield (first - span[0], last - span[0]), (at + first - start, at + last - start)
        at += stop - start
