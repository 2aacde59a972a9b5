"""Reading a Hugging Face model folder: config.json and safetensors, through the family's table."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.checkpoint.canonical import EMBEDDING, OUTPUT_LAYER
from mindspeed_lora.checkpoint.formats.hf_quantized import (
    StoredMatrix,
    check_not_mixed,
    companions,
    quantized_matrices,
    read_matrix,
)
from mindspeed_lora.checkpoint.formats.stacked_experts import WeightFile, under_own_names
from mindspeed_lora.checkpoint.latest import Latest
from mindspeed_lora.checkpoint.messages import first_few
from mindspeed_lora.checkpoint.quantized.values import fill_values
from mindspeed_lora.checkpoint.source import CheckpointSource, Origin, StoredPart
from mindspeed_lora.checkpoint.storage.manifest import manifest_folder
from mindspeed_lora.checkpoint.storage.safetensors_file import CHUNK_BYTES, TensorEntry
from mindspeed_lora.checkpoint.storage.tensor_file import open_tensor_file
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import family_for, shape_from_config
from mindspeed_lora.models.families.mapping import Region
from mindspeed_lora.models.families.segments import Range
from mindspeed_lora.quantization.matrix import QuantizedMatrix

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX_FILE = "pytorch_model.bin.index.json"

WEIGHT_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_NUMBERS = re.compile(r"\.\d+\.")
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
    """The weight files of a folder as one store of named tensors: safetensors, else pickled state dicts."""

    def __init__(self, folder: Path, checking: bool = True) -> None:
        self.folder = folder
        index, paths = _weight_paths(folder)
        self.files: list[WeightFile] = [open_tensor_file(path, checking) for path in paths]
        self.owner: dict[str, WeightFile] = {}
        for file in self.files:
            for name in file.entries:
                if name in self.owner:
                    raise Refused(
                        f"{folder}: tensor {name} is in {self.owner[name].path.name} and {file.path.name}."
                    )
                self.owner[name] = file
        if index is not None:
            _check_index(index, self.owner)

    def entry(self, name: str) -> TensorEntry:
        """Dtype, shape and place of a tensor."""
        return self.owner[name].entries[name]

    def read_into(self, out: torch.Tensor, name: str, region: Region) -> None:
        """Fill ``out`` with ``region`` of a tensor."""
        self.owner[name].read_into(out, name, region)


def _weight_paths(folder: Path) -> tuple[Path | None, list[Path]]:
    """The index, if there is one, and the weight files."""
    forms = (
        (INDEX_FILE, WEIGHTS_FILE, "*.safetensors"),
        (PICKLED_INDEX_FILE, PICKLED_FILE, "pytorch_model*.bin"),
    )
    for index_name, single, pattern in forms:
        index = folder / index_name
        if index.is_file():
            return index, [folder / name for name in sorted(set(_weight_map(index).values()))]
        if os.path.lexists(folder / single):
            return None, [folder / single]
        others = sorted(path.name for path in folder.glob(pattern))
        if others:
            raise Refused(f"{folder}: {index_name} is missing beside {others[0]}.")
    raise Refused(f"{folder}: no weights; expected {WEIGHTS_FILE} or {INDEX_FILE} with its shards.")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Refused(f"{index}: weight_map is missing or empty.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", "..", "."):
            raise Refused(f"{index}: tensor {name} is mapped to {file!r}, which is not a file name.")
        if Path(file).suffix != Path(index.name.removesuffix(".index.json")).suffix:
            raise Refused(
                f"{index}: tensor {name} is mapped to {file!r}, which is not of the index's own form."
            )
    return weight_map


def _check_index(index: Path, owner: dict[str, WeightFile]) -> None:
    for name, file in _weight_map(index).items():
        if name not in owner or owner[name].path.name != file:
            found = f"it is in {owner[name].path.name}" if name in owner else "it is not there"
            raise Refused(f"{index}: tensor {name} should be in {file}, but {found}.")


class HfSource(CheckpointSource):
    """A Hugging Face folder read by canonical names."""

    def __init__(self, folder: Path, checking: bool = True, headers_only: bool = False) -> None:
        shape = shape_of(folder)
        super().__init__(folder, shape, origin_of(folder), folder)
        self.config = read_config(folder)
        self.family = family_for(self.config)
        self.files = WeightFiles(folder, checking)
        under_own_names(self.files.owner, self.family, shape)
        self.manifest_folder = manifest_folder(folder) if checking else None
        self._headers_only = headers_only
        self.matrices = self._quantized_matrices()
        """The quantised ones, by the Hugging Face names of their weights."""
        self.quantization = next((one.state.settings for one in self.matrices.values()), None)
        self._latest: Latest[list[QuantizedMatrix]] = Latest()
        self._check_tensors()
        stored = WEIGHT_DTYPES[self.dtype(EMBEDDING)]
        self.shape = dataclasses.replace(shape, params_dtype=stored)

    def hf_names(self, name: str) -> tuple[str, ...]:
        """Hugging Face names of the tensors that a canonical tensor is made of."""
        mapping, layer = self.family.mapping(name)
        return mapping.names(layer)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a canonical tensor is stored in."""
        return self._entry(self.hf_names(name)[0]).dtype

    def is_quantized(self, name: str) -> bool:
        """Whether a canonical tensor is stored quantised."""
        return self.hf_names(name)[0] in self.matrices

    def quantized(self, name: str) -> list[QuantizedMatrix] | None:
        """The whole quantised matrices of a linear's weight; None where it is plain."""
        if not self.is_quantized(name):
            return None
        return [read_matrix(self.files, one, self.matrices[one]) for one in self.hf_names(name)]

    def parts(self, name: str) -> list[StoredPart]:
        """The Hugging Face tensors that a canonical tensor is made of."""
        names = [
            part
            for one in self.hf_names(name)
            for part in (self.matrices[one].parts.values() if one in self.matrices else (one,))
        ]
        entries = [self.files.entry(one) for one in names]
        return [
            StoredPart(one, self.files.owner[one].path, entry.dtype, entry.shape)
            for one, entry in zip(names, entries, strict=True)
        ]

    def _entry(self, hf_name: str) -> TensorEntry:
        """Dtype and shape of a tensor; of a quantised one, of the matrix that it stands for."""
        stored = self.matrices.get(hf_name)
        return self.files.entry(hf_name) if stored is None else stored.entry

    def _quantized_matrices(self) -> dict[str, StoredMatrix]:
        embedding = self.hf_names(EMBEDDING)[0]
        known = embedding in self.files.owner
        return quantized_matrices(self.files, self.files.entry(embedding).dtype if known else torch.float32)

    def _fill(self, out: torch.Tensor, name: str, wanted: Sequence[Sequence[Range]]) -> None:
        mapping, layer = self.family.mapping(name)
        rows = self.tensors[name][0]
        if self.is_quantized(name):
            matrices = self._latest.get(name, lambda: self.quantized(name) or [])
            fill_values(out, matrices, mapping.segments(self.shape, rows), wanted)
        else:
            mapping.read(self.files, self.shape, rows, layer, out, wanted)

    def _check_tensors(self) -> None:
        """Compare the files with what config.json promises: names, shapes, dtypes."""
        used = companions(self.matrices)
        missing: list[str] = []
        kinds: dict[str, str] = {}
        for name, full in self.tensors.items():
            mapping, layer = self.family.mapping(name)
            names = mapping.names(layer)
            used.update(names)
            if self.matrices and len(full) == 2:
                kinds.update({one: _NUMBERS.sub(".", one) for one in names})
            absent = [one for one in names if one not in self.files.owner]
            missing += absent
            if not absent:
                self._check_parts(names, mapping.hf_shapes(self.shape, full))
        if missing:
            self._refuse_without_head(missing)
            raise Refused(f"{self.path}: tensors are missing from the weight files: {first_few(missing)}.")
        extra = [name for name in self.files.owner if name not in used and not self._is_left_out(name)]
        output_layer = self.hf_names(OUTPUT_LAYER)[0]
        if output_layer in extra and not self.shape.untie_embeddings_and_output_weights:
            extra.remove(output_layer)
            if not self._headers_only:
                self._check_tied_duplicate(output_layer)
        if extra:
            raise Refused(
                f"{self.path}: tensors are not known in a {self.family.name} model with this config.json: "
                f"{first_few(extra)}."
            )
        check_not_mixed(self.path, kinds, self.matrices, self.config)

    def _is_left_out(self, name: str) -> bool:
        """Whether a tensor holds nothing learned, or is of a layer that predicts further tokens, behind the last one.

        transformers leaves those layers out too.
        """
        match = _HF_LAYER.match(name)
        if match is not None and int(match.group(1)) >= self.shape.num_layers:
            further = int(self.config.get("num_nextn_predict_layers") or 0)
            return int(match.group(1)) < self.shape.num_layers + further
        return self.family.is_ignored(name)

    def _refuse_without_head(self, missing: Sequence[str]) -> None:
        """A model that was saved without its head has all names without the first word."""
        for name in missing:
            _, _, rest = name.partition(".")
            if rest in self.files.owner:
                raise Refused(
                    f"{self.files.owner[rest].path}: holds {rest} where {name} is expected: the model was saved "
                    "without its head; save it with AutoModelForCausalLM."
                )

    def _check_parts(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
        for name, expected in zip(names, shapes, strict=True):
            entry = self._entry(name)
            file = self.files.owner[name].path
            if (name in self.matrices) != (names[0] in self.matrices):
                plain, quantized = (name, names[0]) if names[0] in self.matrices else (names[0], name)
                raise Refused(
                    f"{file}: tensor {plain} is plain and {quantized} quantised; fused matrices must agree."
                )
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
            if entry.dtype != self._entry(names[0]).dtype:
                raise Refused(
                    f"{file}: tensor {name} is {entry.dtype} and {names[0]} is "
                    f"{self._entry(names[0]).dtype}; matrices that are fused must have one dtype."
                )

    def _check_tied_duplicate(self, output_layer: str) -> None:
        """A tied model's file may repeat the embedding as its output layer; refuse one that differs."""
        embedding, entry = self.hf_names(EMBEDDING)[0], self.files.entry(output_layer)
        rows, columns = self.tensors[EMBEDDING]
        same = entry.shape == (rows, columns) and entry.dtype == self.dtype(EMBEDDING)
        step = max(1, CHUNK_BYTES // (columns * entry.dtype.itemsize))
        for start in range(0, rows if same else 0, step):
            region = ((start, min(start + step, rows)), (0, columns))
            one, two = (torch.empty((region[0][1] - start, columns), dtype=entry.dtype) for _ in range(2))
            self.files.read_into(one, embedding, region)
            self.files.read_into(two, output_layer, region)
            same = same and torch.equal(one.view(torch.uint8), two.view(torch.uint8))
        if not same:
            raise Refused(
                f"{self.path}/config.json says tie_word_embeddings true, but {output_layer} differs from "
                f"{embedding}; set tie_word_embeddings to false or remove {output_layer}."
            )
