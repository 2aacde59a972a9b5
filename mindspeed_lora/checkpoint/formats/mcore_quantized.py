"""Quantised weights in the rank files of a Megatron checkpoint.

In the manner of MindSpeed-LLM a shard's codes take the weight's place, and bitsandbytes' other tensors lie beside it
under its name (``linear_qkv.weight``, ``linear_qkv.weight.absmax`` …). What each of them holds, so that any layout can
be made of any other, is told in :mod:`mindspeed_lora.checkpoint.quantized.shards`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mindspeed_lora.checkpoint.canonical import tensor_rule
from mindspeed_lora.checkpoint.engine import Part, PlannedTensor
from mindspeed_lora.checkpoint.formats.hf_quantized import check_tables
from mindspeed_lora.checkpoint.formats.mcore_shards import Shards
from mindspeed_lora.checkpoint.messages import first_few
from mindspeed_lora.checkpoint.quantized.shards import ROWS, Cut, joined_matrices, shard_specs, shard_tensors
from mindspeed_lora.checkpoint.quantized.state import FOUR_BITS, MAX_STATE_BYTES, STATE, State, parse_state
from mindspeed_lora.checkpoint.source import Source, StoredPart
from mindspeed_lora.checkpoint.storage.safetensors_file import TensorEntry
from mindspeed_lora.checkpoint.storage.tensor_writer import TensorSpec
from mindspeed_lora.config.quantization import QuantSettings
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES
from mindspeed_lora.quantization.matrix import QuantizedMatrix

Specs = Sequence[Mapping[str, TensorSpec]]
"""Dtype and shape of tensors by their names, for each file."""

_BESIDE = re.compile(r"(?P<weight>.+\.weight)(?P<part>\.(absmax|quant_map|nested_\w+|quant_state\.\w+|SCB))")


def weight_cut(shape: ModelShape, name: str, full: Sequence[int], num_ranks: int) -> Cut:
    """How a canonical weight is made of Hugging Face matrices, and cut over so many ranks."""
    mapping, _ = FAMILIES[shape.family].mapping(name)
    rule, size = tensor_rule(name), (full[0], full[1])
    segments = tuple(mapping.segments(shape, size[0]))
    return Cut(segments, size, rule, 1 if rule.axis is None else num_ranks)


def plan_quantized(
    source: Source, cut: Cut, name: str, key: str, local_name: str, ranks: Sequence[int | None]
) -> tuple[Specs, PlannedTensor]:
    """The tensors of a quantised weight in each file, and how they get there.

    Args:
        source: has the weight's matrices.
        cut: how it is cut.
        name: its canonical name.
        key: what stands before the names in the writer's terms.
        local_name: its name in the files.
        ranks: of each file the shard that it holds, or None.
    """
    settings, dtype = source.quantization, source.dtype(name)
    assert settings is not None
    specs = [
        {}
        if rank is None
        else {f"{local_name}{part}": spec for part, spec in shard_specs(cut, rank, settings, dtype).items()}
        for rank in ranks
    ]

    def parts(matrices: Any) -> Iterator[Part]:
        for rank, tensors in enumerate(shard_tensors(cut, matrices)):
            for file, held in enumerate(ranks):
                if held == rank:
                    for part, tensor in tensors.items():
                        yield Part(file, f"{key}{local_name}{part}", tensor)

    return specs, PlannedTensor(name, lambda: source.quantized(name) or [], parts)


class QuantizedShards:
    """The quantised weights of rank files; the entries of the shards become those of the weights that they stand for.

    Raises:
        Refused: a tensor is missing, of another dtype or length, or of another way of quantising than the others.
    """

    def __init__(
        self, shards: Shards, shape: ModelShape, sizes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
    ) -> None:
        self._shards, self._shape, self._sizes = shards, shape, sizes
        self._parts: dict[str, list[str]] = {}
        self._states: dict[str, list[State]] = {}
        self._cuts: dict[str, Cut] = {}
        self._entries: dict[str, list[dict[str, TensorEntry]]] = {}
        for name in list(shards.entries):
            match = _BESIDE.fullmatch(name)
            if match is not None:
                self._parts.setdefault(match["weight"], [""]).append(match["part"])
        for name, parts in self._parts.items():
            self._add(name, parts, dtype)
        ways = {states[0].settings: name for name, states in self._states.items()}
        if len(ways) > 1:
            told = "; ".join(f"{name}: {settings}" for settings, name in ways.items())
            raise Refused(
                f"{shards.path(0, next(iter(ways.values())))}: weights are quantised in different ways ({told})."
            )
        self.settings: QuantSettings | None = next(iter(ways), None)
        self._check_mixed()

    def __contains__(self, name: str) -> bool:
        return name in self._states

    def parts(self, name: str) -> list[StoredPart]:
        """The tensors of every rank's shard."""
        return [
            StoredPart(f"{name}{part}", self._shards.path(rank, name), entry.dtype, entry.shape)
            for rank, entries in enumerate(self._entries[name])
            for part, entry in entries.items()
        ]

    def read(self, name: str) -> list[QuantizedMatrix]:
        """The whole Hugging Face matrices of a weight."""
        path = self._shards.path(0, name)
        shards = [
            {part: self._read(rank, f"{name}{part}", entry) for part, entry in entries.items()}
            for rank, entries in enumerate(self._entries[name])
        ]
        states = self._states[name]
        if states[0].settings.kind != "int8":
            for shard in shards:
                check_tables(states[0].settings, shard, f"{path}: {name}")
        for shard in shards:
            for part, tensor in shard.items():
                if tensor.dtype == torch.float32 and not tensor.isfinite().all():
                    raise Refused(f"{path}: {name}{part} holds NaN or infinite values; the file is damaged.")
        return joined_matrices(self._cuts[name], shards, states, f"{path}: {name}")

    def _add(self, name: str, parts: Sequence[str], dtype: torch.dtype) -> None:
        entries, size = self._shards.entries, self._sizes.get(name)
        if name not in entries or size is None or len(size) != 2:
            raise Refused(
                f"{self._shards.path(0, name + parts[1])}: {name}{parts[1]} describes no weight of this model."
            )
        path, count = self._shards.path(0, name), len(entries[name])
        ranks = self._shards.num_ranks(name)
        lacking = [part for part in parts if len(entries[f"{name}{part}"]) != ranks]
        if lacking:
            raise Refused(
                f"{path}: {name}{lacking[0]} is in {len(entries[f'{name}{lacking[0]}'])} of {ranks} ranks."
            )
        try:
            cut = weight_cut(self._shape, name, size, count)
            states = [self._state(name, parts, rank, cut, dtype) for rank in range(count)]
        except ValueError as error:
            raise Refused(f"{path}: {name}: {error}.") from error
        if len({(state.settings, state.dtype, state.offsets) for state in states}) > 1:
            raise Refused(
                f"{path}: {name} is quantised otherwise on other ranks; they are of different checkpoints."
            )
        self._states[name], self._cuts[name] = states, cut
        self._entries[name] = [
            {part: entries[f"{name}{part}"][rank] for part in parts} for rank in range(count)
        ]
        for part in parts[1:]:
            del entries[f"{name}{part}"]
        entries[name] = [TensorEntry(state.dtype, state.shape, -1) for state in states]

    def _state(self, name: str, parts: Sequence[str], rank: int, cut: Cut, dtype: torch.dtype) -> State:
        """The state of one rank's shard, whose tensors have the dtypes and shapes that it means."""
        entries, path = self._shards.entries, self._shards.path(rank, name)
        shape = cut.local_shape(rank % cut.size)
        kinds = [part.removeprefix(STATE) for part in parts if part.startswith(STATE)]
        expected: dict[str, TensorSpec] = {}
        if ROWS in parts:
            state = State(QuantSettings("int8"), dtype, shape)
        elif len(kinds) == 1 and kinds[0] in FOUR_BITS:
            full = f"{name}{STATE}{kinds[0]}"
            entry = entries[full][rank]
            if entry.dtype != torch.uint8 or len(entry.shape) != 1 or entry.num_bytes > MAX_STATE_BYTES:
                raise Refused(
                    f"{path}: {full} is {entry.dtype} {list(entry.shape)}; expected a text in uint8."
                )
            data = self._read(rank, full, entry).numpy()
            state = parse_state(bytes(data), kinds[0], f"{path}: {full}")
            expected = {f"{STATE}{kinds[0]}": (torch.uint8, entry.shape)}
            if state.shape != shape or (state.settings.double and len(state.offsets) != len(cut.shapes)):
                raise Refused(
                    f"{path}: {full} says shape {list(state.shape)} and {len(state.offsets)} means; expected "
                    f"{list(shape)} and those of {len(cut.shapes)} matrices."
                )
        else:
            raise Refused(
                f"{path}: {name} lies beside {first_few([f'{name}{part}' for part in parts[1:]])}; expected one of "
                f"{', '.join(f'{name}{STATE}{kind}' for kind in FOUR_BITS)}."
            )
        expected = {**shard_specs(cut, rank % cut.size, state.settings, state.dtype), **expected}
        if set(expected) != set(parts):
            odd = sorted(set(expected) ^ set(parts))[0]
            raise Refused(
                f"{path}: {name}{odd} {'is missing' if odd in expected else 'does not belong there'}."
            )
        for part, (kind, size) in expected.items():
            entry = entries[f"{name}{part}"][rank]
            if (entry.dtype, entry.shape) != (kind, size):
                raise Refused(
                    f"{path}: {name}{part} is {entry.dtype} {list(entry.shape)}; expected {kind} {list(size)}."
                )
        return state

    def _read(self, rank: int, name: str, entry: TensorEntry) -> torch.Tensor:
        out = torch.empty(entry.shape, dtype=entry.dtype)
        self._shards.read_into(out, f"{rank}:{name}", tuple((0, size) for size in entry.shape))
        return out

    def _check_mixed(self) -> None:
        """Refuse codes without what describes them."""
        for name, entries in self._shards.entries.items():
            if name not in self._states and entries[0].dtype in (torch.uint8, torch.int8):
                dtype = str(entries[0].dtype).removeprefix("torch.")
                raise Refused(
                    f"{self._shards.path(0, name)}: {name} is {dtype}, but what describes it is missing; the "
                    "checkpoint is not whole, or of another program."
                )
