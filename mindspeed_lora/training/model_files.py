"""The whole model in a run's checkpoint, as Megatron's rank files, which ``--load`` and the converter read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mindspeed_lora.checkpoint.canonical import without_wrappers
from mindspeed_lora.checkpoint.formats.mcore_experts import ExpertRanks
from mindspeed_lora.checkpoint.formats.mcore_files import RANK_FILE
from mindspeed_lora.checkpoint.formats.mcore_writer import model_keys, rank_folder, rank_layout
from mindspeed_lora.checkpoint.formats.megatron_args import args_from_shape
from mindspeed_lora.checkpoint.formats.model_files import keep_hf_config
from mindspeed_lora.checkpoint.loading.local_parameters import LocalParameter
from mindspeed_lora.checkpoint.source import Source
from mindspeed_lora.checkpoint.storage.tensor_writer import TensorWriter
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.config.stages import LayerPlacement
from mindspeed_lora.parallel.collectives import all_gather_objects
from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.quantization.shard import QuantizedWeight


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Writes this rank's file of the model, without adapters, under Megatron's names; quantised weights dequantised."""

    shape: ModelShape
    source: Source
    """Where the weights came from; its configuration and tokenizer files are kept with them."""
    chunks: Sequence[Sequence[LocalParameter]]
    """The parameters of each model chunk of this rank."""
    placement: LayerPlacement
    padded_vocab_size: int
    params_dtype: str
    """torch's name of the dtype of the weights."""
    groups: ParallelGroups

    def write(self, folder: Path, iteration: int) -> None:
        """Writes this rank's file into an iteration's folder; for ranks that :meth:`is_writer` names."""
        groups, experts = self.groups, self._experts()
        # Layer numbers in the file are local to the chunk.
        chunks = [dict(_entries(parameters)) for parameters in self.chunks]
        args = args_from_shape(
            dataclasses.replace(self.shape, params_dtype=self.params_dtype),
            groups.tp_size,
            self.placement,
            self.padded_vocab_size,
            iteration,
            experts,
        )
        models = dict(zip(model_keys(len(chunks)), chunks, strict=True))
        specs = {
            key: {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
            for key, entries in models.items()
        }
        target = rank_folder(
            folder, groups.tp_rank, groups.pp_rank, groups.pp_size, groups.experts.ep_rank, experts.ep_size
        )
        target.mkdir(parents=True)
        with TensorWriter(target / RANK_FILE, rank_layout(args, iteration, specs)) as writer:
            for key, entries in models.items():
                for local_name, entry in entries.items():
                    writer.write(f"{key}/{local_name}", entry.value().cpu())
        if groups.is_main and self.source.config_dir is not None:
            keep_hf_config(Path(self.source.config_dir), self.source.origin, folder, self.shape)

    def _experts(self) -> ExpertRanks:
        """How the experts are cut over the files."""
        tp_size, experts = self.groups.tp_size, self.groups.experts
        if self.shape.moe is None:
            return ExpertRanks(tp_size=tp_size, etp_size=tp_size)
        return ExpertRanks(tp_size=tp_size, ep_size=experts.ep_size, etp_size=experts.etp_size)

    def local_bytes(self) -> int:
        """What the parameters of this rank take in a file."""
        entries = [entry for parameters in self.chunks for _, entry in _entries(parameters)]
        return sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in entries)

    def is_writer(self) -> bool:
        """Whether this rank is the first of those whose file has one name; every rank calls it."""
        groups = self.groups
        name = groups.tp_rank, groups.pp_rank, groups.experts.ep_rank if self._experts().ep_size > 1 else 0
        names: list[tuple[int, int, int]] = all_gather_objects(name, groups)
        return names.index(name) == groups.rank


@dataclass(frozen=True)
class _Entry:
    """One tensor of a file; of a quantised weight its values are formed when they are written."""

    weight: torch.Tensor | QuantizedWeight

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def value(self) -> torch.Tensor:
        return self.weight.dense() if isinstance(self.weight, QuantizedWeight) else self.weight.detach()


def _entries(parameters: Sequence[LocalParameter]) -> Iterator[tuple[str, _Entry]]:
    """Names in a file, and tensors, of a chunk's parameters without its adapters; experts each alone."""
    for parameter in parameters:
        if parameter.is_adapter:
            continue
        name, weight = without_wrappers(parameter.local_name), parameter.param
        if not parameter.is_stack:
            yield name, _Entry(weight)
            continue
        for number in range(weight.size(0)):
            expert = weight.expert(number) if isinstance(weight, QuantizedWeight) else weight[number]
            yield name.replace(".experts.", f".experts.local_experts.{number}.", 1), _Entry(expert)
