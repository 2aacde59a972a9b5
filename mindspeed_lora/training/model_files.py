"""The whole model in a run's checkpoint, as Megatron's rank files, which ``--load`` and the converter read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mindspeed_lora.checkpoint.canonical import without_wrappers
from mindspeed_lora.checkpoint.local_parameters import LocalParameter
from mindspeed_lora.checkpoint.mcore_writer import open_rank_file, rank_folder
from mindspeed_lora.checkpoint.megatron_args import args_from_shape
from mindspeed_lora.checkpoint.model_files import keep_hf_config
from mindspeed_lora.checkpoint.source import Source
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.config.stages import LayerPlacement
from mindspeed_lora.parallel.groups import ParallelGroups


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Writes this rank's file of the model, without adapters, under Megatron's names."""

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
        """Writes into an iteration's folder; one data-parallel rank does."""
        groups = self.groups
        # Layer numbers in the file are local to the chunk.
        chunks = [
            {without_wrappers(p.local_name): p.param.detach() for p in parameters if not p.is_adapter}
            for parameters in self.chunks
        ]
        args = args_from_shape(
            dataclasses.replace(self.shape, params_dtype=self.params_dtype),
            groups.tp_size,
            self.placement,
            self.padded_vocab_size,
            iteration,
        )
        specs = [
            {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            for tensors in chunks
        ]
        target = rank_folder(folder, groups.tp_rank, groups.pp_rank, groups.pp_size)
        with open_rank_file(target, args, iteration, specs) as writer:
            for tensors in chunks:
                for name, tensor in tensors.items():
                    writer.write(name, tensor.cpu())
        if groups.is_main and self.source.config_dir is not None:
            keep_hf_config(Path(self.source.config_dir), self.source.origin, folder, self.shape)
