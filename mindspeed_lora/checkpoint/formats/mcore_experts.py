"""Experts in the rank files of a Megatron checkpoint: which file holds which of them, and under which names.

Megatron-LM names a file by its rank's tensor-, pipeline- and expert-parallel numbers. The ranks of a pipeline stage
are arranged twice: rank ``r`` has tensor-parallel number ``r mod TP``, expert-tensor-parallel number ``r mod ETP`` and
expert-parallel number ``r div ETP mod EP``. Where ETP divides TP, the numbers in a name tell all of them; where it does
not, two ranks of different contents have one name, so that Megatron-LM itself cannot save such a layout.

MindSpeed-LLM's ``--moe-tp-extend-ep`` counts otherwise: the rank of numbers (tp, ep) holds block ``ep · TP + tp`` of
``EP · TP`` blocks of whole experts.

An expert's matrices lie in a file alone (``local_experts.N.linear_fc1.weight``, by Transformer Engine
``linear_fc1.weightN``) or stacked as megatron-core's ``GroupedMLP`` has them: ``weight1`` ``[h, E·2f/ETP]`` is the
memory of ``[E, h, 2f/ETP]``, ``weight2`` ``[E·f/ETP, h]`` that of ``[E, f/ETP, h]``, each matrix transposed.
MindSpeed-LLM's factors beside them lie alike: ``weight1_lora_a`` ``[h, r·E]`` is the memory of ``[E, h, r]``,
``weight1_lora_b`` ``[r, E·2f/ETP]`` of ``[E, r, 2f/ETP]``, ``weight2_lora_a`` ``[E·f/ETP, r]`` of ``[E, f/ETP, r]`` and
``weight2_lora_b`` ``[r·E, h]`` of ``[E, r, h]``, each factor transposed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mindspeed_lora.checkpoint.canonical import EXPERTS, expert_number
from mindspeed_lora.checkpoint.storage.safetensors_file import TensorEntry
from mindspeed_lora.errors import Refused

SEQUENTIAL, GROUPED, TE_GROUPED = "sequential", "grouped", "te_grouped"
"""Ways in which experts lie in a file: each under its number, stacked, and each a parameter of one module."""

_NUMBER = re.compile(rf"{re.escape(EXPERTS)}\.(\d+)\.(linear_fc[12])\.weight")
_STACKED = re.compile(r"mlp\.experts\.weight([12])(?:_(lora_[ab]))?$")
_STACKED_OF = {"linear_fc1": "weight1", "linear_fc2": "weight2"}


@dataclass(frozen=True, kw_only=True)
class ExpertRanks:
    """How the experts are cut over the rank files of a pipeline stage."""

    tp_size: int = 1
    ep_size: int = 1
    """Of the numbers in the files' names."""
    etp_size: int = 1
    extended: bool = False
    """Whether the tensor-parallel ranks share the experts, by MindSpeed-LLM's ``--moe-tp-extend-ep``."""

    @property
    def num_blocks(self) -> int:
        """Into how many blocks of neighbouring experts they are cut."""
        return self.ep_size * (self.tp_size if self.extended else 1)

    def place(self, tp_rank: int, ep_rank: int) -> tuple[int, int]:
        """Expert-tensor-parallel rank and block of experts of a file."""
        if self.extended:
            return 0, ep_rank * self.tp_size + tp_rank
        return tp_rank % self.etp_size, ep_rank

    def files(self) -> list[tuple[int, int]]:
        """Tensor- and expert-parallel numbers of the files that a rank of any such run reads."""
        if self.extended:
            return [(tp, ep) for ep in range(self.ep_size) for tp in range(self.tp_size)]
        ranks = range(math.lcm(self.tp_size, self.etp_size * self.ep_size))
        found = {(rank % self.tp_size, rank // self.etp_size % self.ep_size) for rank in ranks}
        return sorted(found, key=lambda file: (file[1], file[0]))

    def num_local(self, num_experts: int) -> int:
        """Experts of a layer in one file.

        Raises:
            Refused: the blocks are not of equal size.
        """
        if num_experts % self.num_blocks:
            raise Refused(f"{num_experts} experts do not divide into {self.num_blocks} expert-parallel ranks")
        return num_experts // self.num_blocks


@dataclass(frozen=True)
class Transposed(TensorEntry):
    """A matrix whose columns lie one after the other in the file; ``shape`` is that of the matrix."""

    @property
    def stored(self) -> TensorEntry:
        """What lies in the file."""
        return TensorEntry(self.dtype, self.shape[::-1], self.offset)


def in_file(local_name: str, num_local: int, form: str) -> tuple[str, tuple[int, int] | None]:
    """Name in its file of an expert's tensor with its global number; where stacked, its number of so many pieces.

    The tensor of a stacked one is its transpose.
    """
    match = _NUMBER.search(local_name)
    if match is None:
        return local_name, None
    number, linear = int(match[1]) % num_local, match[2]
    place = local_name[: match.start()]
    if form == GROUPED:
        return f"{place}mlp.experts.{_STACKED_OF[linear]}", (number, num_local)
    if form == TE_GROUPED:
        return f"{place}mlp.experts.{linear}.weight{number}", None
    return f"{place}{EXPERTS}.{number}.{linear}.weight", None


def stacked_shape(shape: tuple[int, ...], num_local: int, linear: str) -> tuple[int, ...]:
    """Shape of the parameter that stacks a file's experts, of whose matrices ``[out, in]`` each has ``shape``."""
    rows, columns = shape
    return (columns, num_local * rows) if linear == "linear_fc1" else (num_local * columns, rows)


def is_grouped(local_name: str) -> bool:
    """Whether an entry of a file stacks the experts of a layer."""
    return _STACKED.search(local_name) is not None


def unstacked(
    local_name: str, entry: TensorEntry, num_local: int, hidden_size: int
) -> Iterator[tuple[str, TensorEntry]]:
    """The tensors that an entry of a file stands for: itself, or where it stacks experts each of them.

    Raises:
        ValueError: the shape is none of so many experts.
    """
    match = _STACKED.search(local_name)
    if match is None:
        yield local_name, entry
        return
    first, linear, kind = match[1] == "1", f"linear_fc{match[1]}", match[2] or "weight"
    axis = 1 if first else 0
    # The other side of fc1's B and of fc2's A is the rank.
    is_hidden = kind == "weight" or kind == ("lora_a" if first else "lora_b")
    fits = len(entry.shape) == 2 and not entry.shape[axis] % num_local
    if not fits or (is_hidden and entry.shape[1 - axis] != hidden_size):
        raise ValueError(
            f"shape {list(entry.shape)} does not stack {num_local} experts of hidden size {hidden_size}"
        )
    width, other, offset = entry.shape[axis] // num_local, entry.shape[1 - axis], entry.offset
    shape = (width, other) if first else (other, width)
    for number in range(num_local):
        part = Transposed(entry.dtype, shape, offset)
        yield f"{local_name[: match.start()]}{EXPERTS}.{number}.{linear}.{kind}", part
        offset += part.num_bytes


def with_expert(name: str, first: int) -> str:
    """The name with an expert's global number, given that of a file whose experts begin at ``first``."""
    number = expert_number(name)
    if number is None:
        return name
    return name.replace(f"{EXPERTS}.{number}.", f"{EXPERTS}.{first + number}.", 1)
