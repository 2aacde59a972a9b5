"""Saving a run's checkpoint from all ranks, crash-safe: the previous one stays whole until the new one is."""

from __future__ import annotations

import dataclasses
import errno
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mindspeed_lora.atomic import StagedDirectory, atomic_link, atomic_text
from mindspeed_lora.checkpoint.formats.iteration import LATEST_FILE, iteration_folder
from mindspeed_lora.checkpoint.formats.model_files import HF_CONFIG_FOLDER
from mindspeed_lora.checkpoint.loading.model import AdapterPlan
from mindspeed_lora.checkpoint.peft.source import write_adapter
from mindspeed_lora.checkpoint.storage.safetensors_writer import SafetensorsWriter
from mindspeed_lora.config.checkpoint import CheckpointConfig
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.device import random_states, restore_random_states
from mindspeed_lora.errors import Failed, system_error, system_reason
from mindspeed_lora.parallel.collectives import gather_objects, together
from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.training.model_files import ModelFiles
from mindspeed_lora.training.optimizer import AdamW
from mindspeed_lora.training.optimizer_files import write_optimizer
from mindspeed_lora.training.run_folder import (
    ADAPTER_FOLDER,
    BEST_FOLDER,
    OPTIMIZER_FOLDER,
    RANDOM_FOLDER,
    STATE_FILE,
    prune,
)
from mindspeed_lora.training.shard_slice import ShardSlice
from mindspeed_lora.training.storage import Storage, complete_folders, folder_of_leader


@dataclass(frozen=True, kw_only=True)
class RunWriter:
    """Writes the checkpoints of a run; every rank has one and calls the same methods."""

    save: Path
    checkpoint: CheckpointConfig
    groups: ParallelGroups
    storage: Storage
    shape: ModelShape
    optimizer: AdamW
    adapter: AdapterPlan | None
    adapter_dtype: torch.dtype
    base_model_name: str | None
    write_tokenizer: Callable[[Path], None]
    """Puts the tokenizer files, with the template that was trained, into a folder."""
    has_new_words: bool
    """The tokenizer knows tokens that the one beside the weights does not."""
    model_files: ModelFiles | None
    """The whole model's, where that is saved too."""

    def write(self, state: dict[str, Any]) -> tuple[Path, float]:
        """Saves iteration ``state["iteration"]``; returns its folder and the seconds it took."""
        started = time.perf_counter()
        target = iteration_folder(self.save, state["iteration"])
        with _told(self.save, state["iteration"]):
            self._write_folder(target, state)
            together(self.groups, lambda: self._announce(target) if self.storage.leads else None)
        return target, time.perf_counter() - started

    def estimated_bytes(self, trained: int) -> int:
        """Of one checkpoint, where this rank trains so many numbers: masters, two moments, and what is trained.

        The model itself is counted where it is saved too, as if every rank wrote as much as this one.
        """
        groups = self.groups
        copies = groups.tp_size * groups.pp_size
        size = trained * 4 * (1 if self.checkpoint.no_save_optim else 4) * copies
        return size + (self.model_files.local_bytes() * copies if self.model_files is not None else 0)

    def write_best(self, state: dict[str, Any]) -> Path:
        """Saves the state as ``<save>/best``, which ``--save-total-limit`` never deletes."""
        with _told(self.save, state["iteration"]):
            self._write_folder(self.save / BEST_FOLDER, state)
        return self.save / BEST_FOLDER

    def _write_folder(self, target: Path, state: dict[str, Any]) -> None:
        groups = self.groups
        staging = together(
            groups, lambda: StagedDirectory(target, overwrite=True) if self.storage.leads else None
        )
        folder = folder_of_leader(self.storage, staging.path if staging is not None else None, groups)
        try:
            together(groups, lambda: self._write_own_files(folder))
            if self.model_files is not None:
                model_files, iteration = self.model_files, state["iteration"]
                writes = model_files.is_writer()
                together(groups, lambda: model_files.write(folder, iteration) if writes else None)
            trained = self._gather_trained() if self.adapter is not None else None
            together(groups, lambda: self._describe(folder, state, trained) if groups.is_main else None)
            complete_folders(folder, self.storage, groups)
            together(groups, lambda: staging.commit() if staging is not None else None)
        finally:
            if staging is not None:
                staging.discard()

    def _write_own_files(self, folder: Path) -> None:
        """What each rank writes by itself."""
        self.optimizer.finish_gather()
        if not self.checkpoint.no_save_optim:
            (folder / OPTIMIZER_FOLDER).mkdir(exist_ok=True)
            write_optimizer(folder / OPTIMIZER_FOLDER, self.optimizer, self.groups)
        if not self.checkpoint.no_save_rng:
            (folder / RANDOM_FOLDER).mkdir(exist_ok=True)
            _write_random_states(folder / RANDOM_FOLDER / _random_file(self.groups.rank))

    def _describe(self, folder: Path, state: dict[str, Any], trained: dict[str, torch.Tensor] | None) -> None:
        """What rank 0 writes for all: adapter, tokenizer, state."""
        if self.has_new_words and (folder / HF_CONFIG_FOLDER).is_dir():
            self.write_tokenizer(folder / HF_CONFIG_FOLDER)
        if trained is not None and self.adapter is not None:
            config = dataclasses.replace(
                self.adapter.config,
                dropout=self.adapter.spec.dropout,
                base_model_name=self.base_model_name,
            )
            target = folder / ADAPTER_FOLDER
            values = self._value_of(trained)
            write_adapter(target, self.shape, config, self.adapter.spec, values, self.adapter_dtype)
            self.write_tokenizer(target)
        (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def _value_of(self, trained: dict[str, torch.Tensor]) -> Callable[[str], torch.Tensor]:
        """The whole tensors of the adapter by canonical name: as trained, or as it came with them."""
        source = self.adapter.source if self.adapter is not None else None

        def value(name: str) -> torch.Tensor:
            if name in trained or source is None:
                return trained[name]
            return source.read_whole(name)

        return value

    def _gather_trained(self) -> dict[str, torch.Tensor] | None:
        """Factors, and what is trained with them, whole, in fp32 from the optimizer's masters, on rank 0.

        An adapter is small beside the model: r (in + out) numbers a matrix.
        """
        mine: list[tuple[ShardSlice, torch.Tensor]] = []
        for owned in self.optimizer.written_slices():
            if owned.parameter.counted:
                values = owned.master.detach().cpu()
                mine += [
                    # A slice is sent with all of the memory that it lies in: each expert with the whole buffer.
                    (piece, values[first:last].clone())
                    for piece, first, last in ShardSlice.all_of(owned.parameter, owned.start, owned.stop)
                ]
        gathered = gather_objects(mine, self.groups)
        if gathered is None:
            return None
        trained: dict[str, torch.Tensor] = {}
        for piece, values in (entry for entries in gathered for entry in entries):
            whole = trained.setdefault(piece.name, torch.zeros(piece.shape))
            whole.view(-1)[piece.index()] = values
        return trained

    def _announce(self, target: Path) -> None:
        """Makes a written iteration the one that is found: the latest file and the link to the adapter."""
        iteration = int(target.name.rpartition("_")[2])
        atomic_text(self.save / LATEST_FILE, f"{iteration}")
        if self.adapter is not None:
            atomic_link(self.save / ADAPTER_FOLDER, f"{target.name}/{ADAPTER_FOLDER}")
        if self.checkpoint.save_total_limit is not None:
            prune(target, self.checkpoint.save_total_limit)


@contextmanager
def _told(save: Path, iteration: int) -> Iterator[None]:
    """A full disk and its like end a save with what is left and how to go on."""
    try:
        yield
    except Exception as error:
        system = system_error(error)
        if system is None:
            raise
        full = system.errno in (errno.ENOSPC, errno.EDQUOT)
        raise Failed(
            f"iteration {iteration} could not be saved: {system_reason(system)}; what was saved before is whole, "
            f"{f'make room in {save}' if full else 'mend that'} and go on with --resume auto"
        ) from error


def _write_random_states(file: Path) -> None:
    states = random_states()
    specs = {name: (state.dtype, tuple(state.shape)) for name, state in states.items()}
    with SafetensorsWriter(file, specs) as writer:
        for name, state in states.items():
            writer.write(name, state)


def load_random_states(folder: Path, rank: int) -> bool:
    """Restores this rank's generators from a checkpoint; False where that has no file of this rank.

    Raises:
        Failed: the file is damaged.
    """
    file = folder / RANDOM_FOLDER / _random_file(rank)
    if not file.is_file():
        return False
    try:
        restore_random_states(load_file(file))
    except (SafetensorError, OSError, KeyError, RuntimeError, TypeError) as error:
        raise Failed(
            f"{file}: the random state cannot be read ({error}); resume from an older checkpoint, or give "
            "--no-load-rng"
        ) from error
    return True


def _random_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"
