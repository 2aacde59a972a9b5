"""Reading a Hugging Face model folder: config.json and safetensors, through the family's table."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.checkpoint.canonical import EMBEDDING
from mindspeed_lora.checkpoint.messages import first_few
from mindspeed_lora.checkpoint.safetensors_file import CHUNK_BYTES, SafetensorsFile, TensorEntry
from mindspeed_lora.checkpoint.source import CheckpointSource, Origin
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import family_for, shape_from_config
from mindspeed_lora.models.families.mapping import Region
from mindspeed_lora.models.families.segments import Range

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TIED_DUPLICATE = "lm_head.weight"

WEIGHT_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

_SNAPSHOT = re.compile(r"models--(?P<hub_id>[^/]+)/snapshots/(?P<revision>[^/]+)/?$")


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object from a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Refused(f"{path}: the file is missing.") from error
    except ValueError as error:
        raise Refused(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise Refused(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a folder."""
    return read_json(folder / "config.json")


def shape_of(folder: Path) -> ModelShape:
    """The architecture that a folder's config.json describes."""
    try:
        return shape_from_config(read_config(folder))
    except Refused as error:
        message = str(error)
        raise Refused(f"{folder}/{message}" if message.startswith("config.json") else message) from error


def origin_of(folder: Path) -> Origin:
    """Path, and for a folder within the hub's cache also hub id and revision, of a Hugging Face model."""
    path = str(folder.absolute())
    match = _SNAPSHOT.search(path)
    if match is None:
        return Origin(path)
    return Origin(path, match["hub_id"].replace("--", "/"), match["revision"])


class WeightFiles:
    """The safetensors files of a folder as one store of named tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = [SafetensorsFile(path) for path in _weight_paths(folder)]
        self.owner: dict[str, SafetensorsFile] = {}
        for file in self.files:
            for name in file.entries:
                if name in self.owner:
                    raise Refused(
                        f"{folder}: tensor {name} is in {self.owner[name].path.name} and {file.path.name}."
                    )
                self.owner[name] = file
        _check_index(folder, self.owner)

    def entry(self, name: str) -> TensorEntry:
        """Dtype, shape and place of a tensor."""
        return self.owner[name].entries[name]

    def read_into(self, out: torch.Tensor, name: str, region: Region) -> None:
        """Fill ``out`` with ``region`` of a tensor."""
        self.owner[name].read_into(out, name, region)


def _weight_paths(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.is_file():
        return [folder / name for name in sorted(set(_weight_map(index).values()))]
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise Refused(f"{folder}: {INDEX_FILE} is missing beside {others[0]}.")
    if list(folder.glob("pytorch_model*.bin")):
        raise Refused(
            f"{folder}: holds pytorch_model .bin weights; expected safetensors, save the model anew as such."
        )
    raise Refused(f"{folder}: no weights; expected {WEIGHTS_FILE} or {INDEX_FILE} with its shards.")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Refused(f"{index}: weight_map is missing or empty.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise Refused(f"{index}: tensor {name} is mapped to {file!r}, which is not a file name.")
    return weight_map


def _check_index(folder: Path, owner: dict[str, SafetensorsFile]) -> None:
    index = folder / INDEX_FILE
    if not index.is_file():
        return
    for name, file in _weight_map(index).items():
        if name not in owner or owner[name].path.name != file:
            found = f"it is in {owner[name].path.name}" if name in owner else "it is not there"
            raise Refused(f"{index}: tensor {name} should be in {file}, but {found}.")


class HfSource(CheckpointSource):
    """A Hugging Face folder read by canonical names."""

    def __init__(self, folder: Path) -> None:
        shape = shape_of(folder)
        super().__init__(folder, shape, origin_of(folder), folder)
        self.config = read_config(folder)
        self.family = family_for(self.config)
        self.files = WeightFiles(folder)
        self._check_tensors()
        stored = WEIGHT_DTYPES[self.dtype(EMBEDDING)]
        self.shape = dataclasses.replace(shape, params_dtype=stored)

    def hf_names(self, name: str) -> tuple[str, ...]:
        """Hugging Face names of the tensors that a canonical tensor is made of."""
        mapping, layer = self.family.mapping(name)
        return mapping.names(layer)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a canonical tensor is stored in."""
        return self.files.entry(self.hf_names(name)[0]).dtype

    def _fill(self, out: torch.Tensor, name: str, wanted: Sequence[Sequence[Range]]) -> None:
        mapping, layer = self.family.mapping(name)
        mapping.read(self.files, self.shape, self.tensors[name][0], layer, out, wanted)

    def _check_tensors(self) -> None:
        """Compare the files with what config.json promises: names, shapes, dtypes."""
        used: set[str] = set()
        missing: list[str] = []
        for name, full in self.tensors.items():
            mapping, layer = self.family.mapping(name)
            names = mapping.names(layer)
            used.update(names)
            absent = [one for one in names if one not in self.files.owner]
            missing += absent
            if not absent:
                self._check_parts(names, mapping.hf_shapes(self.shape, full))
        if missing:
            raise Refused(
                f"{self.path}: tensors are missing from the safetensors files: {first_few(missing)}."
            )
        extra = [name for name in self.files.owner if name not in used and not self.family.is_ignored(name)]
        if TIED_DUPLICATE in extra and not self.shape.untie_embeddings_and_output_weights:
            extra.remove(TIED_DUPLICATE)
            self._check_tied_duplicate()
        if extra:
            raise Refused(
                f"{self.path}: tensors are not known in a {self.family.name} model with this config.json: "
                f"{first_few(extra)}."
            )

    def _check_parts(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
        for name, expected in zip(names, shapes, strict=True):
            entry = self.files.entry(name)
            file = self.files.owner[name].path
            if entry.shape != expected:
                raise Refused(
                    f"{file}: tensor {name} has shape {list(entry.shape)}, but {self.path}/config.json "
                    f"means {list(expected)}."
                )
            if entry.dtype not in WEIGHT_DTYPES:
                raise Refused(
                    f"{file}: tensor {name} has dtype {entry.dtype}; "
                    f"expected one of {', '.join(WEIGHT_DTYPES.values())}."
                )
            if entry.dtype != self.files.entry(names[0]).dtype:
                raise Refused(
                    f"{file}: tensor {name} is {entry.dtype} and {names[0]} is "
                    f"{self.files.entry(names[0]).dtype}; matrices that are fused must have one dtype."
                )

    def _check_tied_duplicate(self) -> None:
        """A tied model's file may repeat the embedding as ``lm_head.weight``; refuse one that differs."""
        embedding, entry = self.hf_names(EMBEDDING)[0], self.files.entry(TIED_DUPLICATE)
        rows, columns = self.tensors[EMBEDDING]
        same = entry.shape == (rows, columns) and entry.dtype == self.dtype(EMBEDDING)
        step = max(1, CHUNK_BYTES // (columns * entry.dtype.itemsize))
        for start in range(0, rows if same else 0, step):
            region = ((start, min(start + step, rows)), (0, columns))
            one, two = (torch.empty((region[0][1] - start, columns), dtype=entry.dtype) for _ in range(2))
            self.files.read_into(one, embedding, region)
            self.files.read_into(two, TIED_DUPLICATE, region)
            same = same and torch.equal(one.view(torch.uint8), two.view(torch.uint8))
        if not same:
            raise Refused(
                f"{self.path}/config.json says tie_word_embeddings true, but {TIED_DUPLICATE} differs from "
                f"{embedding}; set tie_word_embeddings to false or remove {TIED_DUPLICATE}."
            )
