"""Factors of experts' 3-D parameters, as PEFT's ``target_parameters`` has them (checked with 0.21): ``E`` experts.

Of a parameter with one A ``[r, in]`` and B ``[out, r]`` an expert the file has ``lora_A`` ``[E·r, in]``, expert by
expert, and ``lora_B`` ``[out, r·E]``, which is ``[out, r, E]``. Where gate_up_proj and down_proj of a layer both have
factors, the former's are named ``experts.base_layer``, since PEFT wraps it first; alone they are named ``experts``, as
the latter's are.

gate_up_proj holds gate's rows above up's, and both have A in common. Where they have none, A holds gate's rows above
up's and B two blocks: ``[[B_gate, 0], [0, B_up]]``, of twice the rank.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mindspeed_lora.checkpoint.canonical import adapter_linears, expert_number
from mindspeed_lora.checkpoint.peft.config import AdapterConfig
from mindspeed_lora.checkpoint.peft.expert_names import DOWN, FUSED, GATE_UP, parameter_of
from mindspeed_lora.checkpoint.peft.trained_tensors import factor_name
from mindspeed_lora.checkpoint.storage.safetensors_file import TensorEntry
from mindspeed_lora.checkpoint.storage.tensor_file import TensorFile
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families.mapping import Region

_KEPT = 4
"""Tensors of B that stay in memory while their experts are read one by one; a layer has two."""


@dataclass(frozen=True, kw_only=True)
class ExpertFactors:
    """The factors of one 3-D parameter."""

    module: str
    """What they are named by in the file (``model.layers.3.mlp.experts.base_layer``)."""
    experts: tuple[tuple[str, ...], ...]
    """For each expert the full Hugging Face names of its matrices: gate and up, or down."""
    rank: int
    """Rows of one expert's A."""
    out_features: int
    """Rows of one expert's B."""
    in_features: int
    separate: bool
    """Each matrix has its own part of the rank."""

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Names and shapes of both tensors in the file."""
        count = len(self.experts) * self.rank
        return {
            factor_name(self.module, "a"): (count, self.in_features),
            factor_name(self.module, "b"): (self.out_features, count),
        }


def expert_factors(
    config: AdapterConfig, linears: Mapping[str, tuple[str, ...]], shape: ModelShape
) -> list[ExpertFactors]:
    """The factors of all experts' parameters that a configuration in the fused form means."""
    sizes = adapter_linears(shape)
    found: dict[str, list[str]] = {}
    for module in linears:
        if expert_number(module) is not None and config.by_parameter(linears[module][0]):
            found.setdefault(parameter_of(linears[module][0]), []).append(module)
    factors = []
    for parameter, modules in found.items():
        place, _, kind = parameter.rpartition(".")
        inner = kind == GATE_UP and f"{place}.{DOWN}" in found
        experts = tuple(linears[module] for module in modules)
        own = config.rank_of(experts[0][0])
        separate = config.separate_gate_up and len(experts[0]) > 1
        factors.append(
            ExpertFactors(
                module=f"{place}.base_layer" if inner else place,
                experts=experts,
                rank=own * len(experts[0]) if separate else own,
                out_features=sizes[modules[0]][0],
                in_features=sizes[modules[0]][1],
                separate=separate,
            )
        )
    return factors


def matrices_of(
    module: str, rank: int, entries: Collection[str], config: AdapterConfig
) -> tuple[list[str], int]:
    """Full names of the matrices that a pair of factors in a file is of, and the number of experts in it.

    Args:
        module: what the factors are named by: a module, or all experts of a layer, whose matrices then have the names
            that most families' have.
        rank: rows of A, of all experts together.
        entries: names of the file's tensors.
        config: the adapter's.
    """
    place = module.removesuffix(".base_layer")
    if config.moe_format != FUSED or place.rpartition(".")[2] != "experts":
        return [module], 1
    has_inner = factor_name(f"{place}.base_layer", "a") in entries
    of_gate_up = module != place if has_inner else not config.by_parameter(f"{place}.0.{DOWN}")
    kinds = ("gate_proj", "up_proj") if of_gate_up else (DOWN,)
    count = max(1, rank // config.rank_of(f"{place}.0.{kinds[0]}"))
    return [f"{place}.{expert}.{kind}" for expert in range(count) for kind in kinds], count


def joined(
    factors: ExpertFactors, experts: Iterable[Sequence[tuple[torch.Tensor, torch.Tensor]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both tensors of the file.

    Args:
        factors: what they are of.
        experts: of each expert one pair ``[r, in]``, ``[out, r]`` for all its matrices, or one for each.
    """
    all_a, all_b = [], []
    for pairs in experts:
        all_a.append(torch.cat([lora_a for lora_a, _ in pairs]))
        all_b.append(pairs[0][1] if len(pairs) == 1 else torch.block_diag(*(lora_b for _, lora_b in pairs)))
    lora_b = torch.stack(all_b, dim=2)
    return torch.cat(all_a), lora_b.reshape(factors.out_features, -1)


def has_blocks(file: TensorFile, factors: Sequence[ExpertFactors]) -> bool | None:
    """Whether gate and up have separate factors throughout; None where every B is zero, which does not tell."""
    found: bool | None = None
    for one in factors:
        if len(one.experts[0]) < 2:
            continue
        if one.rank % 2:
            return False
        whole = file.read(factor_name(one.module, "b")).view(2, one.out_features // 2, 2, -1)
        if whole[0, :, 1].any() or whole[1, :, 0].any():
            return False
        if whole[0, :, 0].any() or whole[1, :, 1].any():
            found = True
    return found


@dataclass(frozen=True)
class _Place:
    """Where one matrix of one expert has its factors."""

    factors: ExpertFactors
    expert: int
    ranks: tuple[int, int]
    """Range of the expert's ranks."""
    rows: tuple[int, int]
    """Range of B's rows."""


class FusedExperts:
    """An adapter's file whose fused factors are read as those of each expert's matrices.

    Raises:
        Refused: a tensor is missing, or of another shape.
    """

    def __init__(self, file: TensorFile, factors: Sequence[ExpertFactors]) -> None:
        self._file = file
        self._places: dict[str, tuple[str, _Place]] = {}
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()
        own = {name for one in factors for name in one.sizes}
        self.entries: dict[str, TensorEntry] = {
            name: entry for name, entry in file.entries.items() if name not in own
        }
        for one in factors:
            self._check(one)
            for expert, names in enumerate(one.experts):
                for number, name in enumerate(names):
                    self._add(name, _place(one, expert, number))

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    def read_into(self, out: torch.Tensor, name: str, region: Region) -> None:
        """Fill ``out`` with ``region`` of a tensor."""
        if name not in self._places:
            self._file.read_into(out, name, region)
            return
        stored, place = self._places[name]
        (low, high), columns = region
        if stored.endswith("lora_A.weight"):
            start = place.expert * place.factors.rank + place.ranks[0]
            self._file.read_into(out, stored, ((start + low, start + high), columns))
            return
        first, last = place.ranks[0] + columns[0], place.ranks[0] + columns[1]
        rows = slice(place.rows[0] + low, place.rows[0] + high)
        out.copy_(self._by_expert(stored, place.factors)[place.expert, rows, first:last])

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor."""
        if name not in self._places:
            return self._file.read(name)
        entry = self.entries[name]
        out = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(out, name, tuple((0, size) for size in entry.shape))
        return out

    def _by_expert(self, stored: str, factors: ExpertFactors) -> torch.Tensor:
        """B of all experts ``[E, out, r]``: an expert's columns lie apart in the file, so it is read once for all."""
        with self._lock:
            if stored not in self._kept:
                whole = self._file.read(stored).view(factors.out_features, factors.rank, -1)
                self._kept[stored] = whole.permute(2, 0, 1).contiguous()
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(stored)
            return self._kept[stored]

    def _check(self, factors: ExpertFactors) -> None:
        for name, size in factors.sizes.items():
            entry = self._file.entries.get(name)
            if entry is None:
                raise Refused(f"{self.path}: adapter tensors are missing: {name}.")
            if entry.shape != size:
                raise Refused(
                    f"{self.path}: {name} has shape {list(entry.shape)}; r {factors.rank} for each of "
                    f"{len(factors.experts)} experts of this base model needs {list(size)}."
                )

    def _add(self, module: str, place: _Place) -> None:
        rank, rows = place.ranks[1] - place.ranks[0], place.rows[1] - place.rows[0]
        for factor, size in (("a", (rank, place.factors.in_features)), ("b", (rows, rank))):
            stored = factor_name(place.factors.module, factor)
            self._places[factor_name(module, factor)] = (stored, place)
            self.entries[factor_name(module, factor)] = TensorEntry(self._file.entries[stored].dtype, size, 0)


def _place(factors: ExpertFactors, expert: int, number: int) -> _Place:
    matrices = len(factors.experts[expert])
    rows, rank = factors.out_features // matrices, factors.rank
    own = rank // matrices
    ranks = (number * own, (number + 1) * own) if factors.separate else (0, rank)
    return _Place(factors, expert, ranks, (number * rows, (number + 1) * rows))
