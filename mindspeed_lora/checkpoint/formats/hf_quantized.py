"""Quantised weights in Hugging Face folders, as transformers with bitsandbytes saves them.

Four bits: ``q_proj.weight`` with the tensors beside it that :mod:`mindspeed_lora.checkpoint.quantized.state` tells.
int8: ``q_proj.weight`` int8 ``[out, in]``, ``q_proj.SCB`` float32 ``[out]`` (the rows' largest magnitudes) and
``q_proj.weight_format``, 0 for rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from mindspeed_lora.checkpoint.messages import first_few
from mindspeed_lora.checkpoint.quantized.state import (
    ABSMAX,
    FOUR_BITS,
    MAX_STATE_BYTES,
    NESTED_ABSMAX,
    STATE,
    State,
    code_tables,
    four_bit_specs,
    num_blocks,
    num_nested,
    parse_state,
)
from mindspeed_lora.checkpoint.storage.safetensors_file import TensorEntry
from mindspeed_lora.checkpoint.storage.tensor_file import TensorFile
from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.errors import Refused
from mindspeed_lora.quantization.matrix import Nested, QuantizedMatrix

SCB, WEIGHT_FORMAT = "SCB", "weight_format"
_FOUR_BIT_PART = re.compile(r"(?P<weight>.+)(?P<part>\.quant_state\.[^.]+|\.(nested_)?(absmax|quant_map))")
_INT8_PART = re.compile(rf"(?P<module>.+\.)(?P<part>{SCB}|{WEIGHT_FORMAT})")
_CODES = (torch.uint8, torch.int8)


class Files(Protocol):
    """A folder's tensors by name."""

    folder: Path

    @property
    def owner(self) -> Mapping[str, TensorFile]:
        """The file of each tensor."""

    def entry(self, name: str) -> TensorEntry:
        """Dtype and shape of a tensor in its file."""


@dataclass(frozen=True)
class StoredMatrix:
    """A quantised Hugging Face matrix, and the tensors that it is stored as."""

    state: State
    parts: dict[str, str]
    """By what :func:`four_bit_specs` calls it, or ``SCB``: the name of a tensor in the files."""

    @property
    def entry(self) -> TensorEntry:
        """Dtype and shape of the matrix that it stands for."""
        return TensorEntry(self.state.dtype, self.state.shape, -1)


def quantized_matrices(files: Files, dtype: torch.dtype) -> dict[str, StoredMatrix]:
    """The quantised matrices of a folder by the names of their weights, everything that headers tell checked.

    ``dtype`` is that of int8 matrices' values: their files do not tell it.

    Raises:
        Refused: a tensor is missing, or of another dtype or length; a state is damaged; two matrices are quantised
            in different ways.
    """
    found = {name: _stored(files, name, parts, dtype) for name, parts in _grouped(files).items()}
    codes = [name for name, file in files.owner.items() if file.entries[name].dtype in _CODES]
    matrices = [name for name in codes if name.endswith(".weight") and len(files.entry(name).shape) == 2]
    lone = [name for name in matrices if name not in found]
    if lone:
        dtypes = str(files.entry(lone[0]).dtype).removeprefix("torch.")
        raise Refused(
            f"{files.owner[lone[0]].path}: {lone[0]} is {dtypes}, but what describes it is missing "
            f"({lone[0]}{STATE}nf4, or SCB beside it); the folder is not whole, or not bitsandbytes'."
        )
    _check_alike(files, found)
    return found


def companions(matrices: Mapping[str, StoredMatrix]) -> set[str]:
    """Names of the tensors beside the weights."""
    return {name for weight, one in matrices.items() for name in one.parts.values() if name != weight}


def read_matrix(files: Files, name: str, stored: StoredMatrix) -> QuantizedMatrix:
    """A whole quantised matrix.

    Raises:
        Refused: its code is another one than bitsandbytes', or a statistic is not finite.
    """
    settings = stored.state.settings
    parts = {part: files.owner[one].read(one) for part, one in stored.parts.items()}
    if settings.kind == "int8":
        if int(parts.get(WEIGHT_FORMAT, torch.zeros(()))):
            raise Refused(
                f"{files.owner[name].path}: {stored.parts[WEIGHT_FORMAT]} is {int(parts[WEIGHT_FORMAT])}; expected 0, "
                "rows; save the model with a newer bitsandbytes."
            )
        packed, absmax, nested = parts[""], parts[SCB], None
    else:
        check_tables(settings, parts, f"{files.owner[name].path}: {name}")
        packed, absmax, nested = parts[""].view(torch.uint8).view(-1, 1), parts[ABSMAX], None
        if settings.double:
            nested = Nested(parts[NESTED_ABSMAX], torch.tensor(stored.state.offsets[0], dtype=torch.float32))
    for statistics in (absmax, *([nested.absmax] if nested else [])):
        if statistics.dtype == torch.float32 and not statistics.isfinite().all():
            raise Refused(
                f"{files.owner[name].path}: {name}: its statistics are not finite; the file is damaged."
            )
    # Rows of int8 have no dtype of their own.
    dtype = torch.float32 if settings.kind == "int8" else stored.state.dtype
    return QuantizedMatrix(settings, stored.state.shape, packed, absmax, nested, dtype)


def check_tables(settings: QuantSettings, parts: Mapping[str, torch.Tensor], name: str) -> None:
    """Refuse a weight whose tables are not those of its kind: its numbers would be others."""
    for part, table in code_tables(settings).items():
        if not torch.equal(parts[part].view(-1), table):
            raise Refused(
                f"{name}{part} is not the table of {settings.kind} that bitsandbytes has; its values would be others."
            )


def _grouped(files: Files) -> dict[str, dict[str, str]]:
    """The tensors of each quantised weight, by what they are."""
    grouped: dict[str, dict[str, str]] = {}
    for name in files.owner:
        four, eight = _FOUR_BIT_PART.fullmatch(name), _INT8_PART.fullmatch(name)
        if four is not None:
            grouped.setdefault(four["weight"], {})[four["part"]] = name
        elif eight is not None:
            grouped.setdefault(f"{eight['module']}weight", {})[eight["part"]] = name
    for weight, parts in grouped.items():
        if weight not in files.owner:
            one = next(iter(parts.values()))
            raise Refused(
                f"{files.owner[one].path}: {one} is there without {weight}; the folder is not whole."
            )
        parts[""] = weight
    return grouped


def _stored(files: Files, name: str, parts: dict[str, str], dtype: torch.dtype) -> StoredMatrix:
    path = files.owner[name].path
    if SCB in parts or WEIGHT_FORMAT in parts:
        return _stored_rows(files, name, parts, dtype)
    states = [part for part in parts if part.startswith(STATE)]
    kinds = [part.removeprefix(STATE) for part in states]
    if len(kinds) != 1 or kinds[0] not in FOUR_BITS:
        found = first_few([parts[part] for part in parts if part])
        raise Refused(
            f"{path}: {name} lies beside {found}; expected one of {', '.join(f'{name}{STATE}{k}' for k in FOUR_BITS)}."
        )
    state_name = parts[states[0]]
    entry = files.entry(state_name)
    if entry.dtype != torch.uint8 or len(entry.shape) != 1 or entry.num_bytes > MAX_STATE_BYTES:
        raise Refused(f"{path}: {state_name} is {_told(entry)}; expected a text in uint8.")
    state = parse_state(
        bytes(files.owner[state_name].read(state_name).numpy()), kinds[0], f"{path}: {state_name}"
    )
    expected = four_bit_specs(
        state.settings,
        state.num_values,
        num_blocks(state.shape, state.settings),
        num_nested(state.shape, state.settings),
        entry.shape[0],
    )
    if len(state.offsets) > 1:
        raise Refused(f"{path}: {state_name}: nested_offset is a list; expected one number.")
    _check_parts(files, name, parts, expected)
    return StoredMatrix(state, parts)


def _stored_rows(files: Files, name: str, parts: dict[str, str], dtype: torch.dtype) -> StoredMatrix:
    """An int8 matrix."""
    shape = files.entry(name).shape
    if SCB not in parts or len(shape) != 2:
        raise Refused(
            f"{files.owner[name].path}: {name} is {_told(files.entry(name))} and lies beside "
            f"{first_few([one for part, one in parts.items() if part])}; expected int8 [out, in] with its SCB."
        )
    _check_parts(
        files,
        name,
        parts,
        {"": (torch.int8, shape), SCB: (torch.float32, shape[:1]), WEIGHT_FORMAT: (torch.uint8, ())},
    )
    return StoredMatrix(State(QuantSettings("int8"), dtype, (shape[0], shape[1])), parts)


def _check_parts(
    files: Files,
    name: str,
    parts: Mapping[str, str],
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> None:
    path = files.owner[name].path
    missing = [part for part in expected if part not in parts and part != WEIGHT_FORMAT]
    if missing:
        raise Refused(f"{path}: {name}{missing[0]} is missing; the folder is not whole.")
    extra = [parts[part] for part in parts if part not in expected]
    if extra:
        raise Refused(f"{path}: {extra[0]} does not belong to how {name} is quantised.")
    for part, (dtype, shape) in expected.items():
        if part not in parts:
            continue
        entry = files.entry(parts[part])
        # Codes may be stored in a wider dtype (bnb_4bit_quant_storage); what counts are their bytes.
        is_codes = part == "" and dtype == torch.uint8
        fits = entry.num_bytes == prod(shape) if is_codes else (entry.dtype, entry.shape) == (dtype, shape)
        if not fits:
            raise Refused(
                f"{files.owner[parts[part]].path}: {parts[part]} is {_told(entry)}; expected "
                f"{_told(TensorEntry(dtype, shape, 0))} by the state of {name}."
            )


def _check_alike(files: Files, found: Mapping[str, StoredMatrix]) -> None:
    ways = {one.state.settings: name for name, one in found.items()}
    if len(ways) > 1:
        told = "; ".join(f"{name}: {settings}" for settings, name in ways.items())
        raise Refused(f"{files.folder}: its matrices are quantised in different ways ({told}); expected one.")


def _told(entry: TensorEntry) -> str:
    return f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"


def check_not_mixed(
    folder: Path, kinds: Mapping[str, str], quantized: Mapping[str, StoredMatrix], config: Mapping[str, Any]
) -> None:
    """Refuse a folder that holds one kind of matrix quantised in some layers and plain in others.

    Args:
        folder: for messages.
        kinds: name of each linear's weight → its name without numbers.
        quantized: the quantised ones.
        config: config.json; what ``llm_int8_skip_modules`` names may be plain.
    """
    skipped = tuple(_skipped(config))
    of_kind: dict[str, str] = {}
    for name, kind in kinds.items():
        if name in quantized:
            of_kind.setdefault(kind, name)
    for name, kind in kinds.items():
        if (
            name not in quantized
            and kind in of_kind
            and not _is_skipped(name.removesuffix(".weight"), skipped)
        ):
            raise Refused(
                f"{folder}: {name} is plain and {of_kind[kind]} quantised, and llm_int8_skip_modules of config.json "
                "does not name it; the files are of different checkpoints."
            )


def _skipped(config: Mapping[str, Any]) -> Iterator[str]:
    names = (config.get("quantization_config") or {}).get("llm_int8_skip_modules") or ()
    return (name for name in names if isinstance(name, str))


def _is_skipped(module: str, names: tuple[str, ...]) -> bool:
    """As transformers matches them: the beginning of a name up to a dot, or its end."""
    return any(module == name or module.startswith(f"{name}.") or module.endswith(name) for name in names)
