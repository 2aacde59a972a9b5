"""The folder of a run, and from where a job starts: fresh, from weights, or where a saved run stopped.

::

    <save>/latest_checkpointed_iteration.txt
    <save>/iter_0000010/run_state.json      iteration, data position, loss scale, layout, best evaluation
                       /adapter/            PEFT folder
                       /optimizer/*.safetensors   masters and moments by canonical name
                       /random/*.safetensors      states of the generators, one file a rank
                       /mp_rank_*/          the model itself, where it is trained or --lora-save-base asks
    <save>/adapter                          link to the newest adapter
    <save>/best/                            the checkpoint of the best evaluation loss
    <save>/config.yaml                      the flags of the job, as --config reads them
    <save>/metrics.jsonl, loss.png, tensorboard/
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_lora.checkpoint.formats.iteration import LATEST_FILE, latest_iteration
from mindspeed_lora.config.jobs import TrainJob
from mindspeed_lora.errors import Refused
from mindspeed_lora.training.reporting.metrics import METRICS_FILE

STATE_FILE = "run_state.json"
ADAPTER_FOLDER = "adapter"
BEST_FOLDER = "best"
OPTIMIZER_FOLDER = "optimizer"
RANDOM_FOLDER = "random"
_TO_BE_REPLACED = ".to_be_replaced"
"""Beside a run that ``--overwrite`` is about to replace: a restart before that must not go on with it."""


@dataclass(frozen=True)
class SavedRun:
    """One whole checkpoint of a run of ours."""

    folder: Path
    state: dict[str, Any]

    @property
    def iteration(self) -> int:
        """Optimizer steps done."""
        return int(self.state["iteration"])


@dataclass(frozen=True, kw_only=True)
class Start:
    """From where a job starts."""

    run: SavedRun | None = None
    """The checkpoint whose weights are taken; None for a fresh start."""
    continues: bool = False
    """Iteration and data position go on from it."""
    load_optimizer: bool = False
    load_random_state: bool = False

    @property
    def iteration(self) -> int:
        """Optimizer steps already done."""
        return self.run.iteration if self.run is not None and self.continues else 0

    def goes_on_in(self, save: Path) -> bool:
        """Whether the run that is gone on with is the one that ``save`` holds."""
        return self.run is not None and self.continues and self.run.folder.parent.resolve() == save.resolve()


def find_saved_run(path: Path) -> SavedRun | None:
    """The checkpoint that a ``--save`` folder or an ``iter_%07d`` folder holds; None where it holds none.

    Raises:
        Refused: the state file cannot be read.
    """
    folder = latest_iteration(path) if (path / LATEST_FILE).is_file() else path
    file = folder / STATE_FILE
    if not file.is_file():
        return None
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        int(state["iteration"])
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(
            f"{file}: not the state of a run ({error}); load an older iter_* folder instead"
        ) from error
    return SavedRun(folder, state)


def find_start(job: TrainJob) -> Start:
    """Where the job starts, by ``--resume``, ``--lora-load``, ``--load``, ``--finetune`` and ``--no-load-*``.

    Raises:
        Refused: ``--save`` holds a run that this job does not go on from, or a checkpoint that is no run.
    """
    checkpoint = job.checkpoint
    save = Path(checkpoint.save) if checkpoint.save else None
    held = find_saved_run(save) if save is not None and save.is_dir() else None
    if held is None and save is not None and (save / LATEST_FILE).is_file():
        raise Refused(
            f"--save {save} holds a Megatron checkpoint that is no training run of this program and would be "
            "overwritten; choose another folder"
        )
    still_old = checkpoint.overwrite and save is not None and (save / _TO_BE_REPLACED).is_file()
    if checkpoint.resume == "auto" and held is not None and not still_old:
        return Start(run=held, continues=True, load_optimizer=True, load_random_state=True)
    start = _start_from_flags(job)
    if held is not None and save is not None and not checkpoint.overwrite and not start.goes_on_in(save):
        raise Refused(
            f"--save {save} holds a run (iteration {held.iteration}) that this job does not go on from; "
            "give --resume auto to go on, --overwrite to replace it, or another folder"
        )
    return start


def _start_from_flags(job: TrainJob) -> Start:
    checkpoint = job.checkpoint
    path = job.lora.lora_load if job.lora.enabled else checkpoint.load
    run = find_saved_run(Path(path)) if path is not None and Path(path).is_dir() else None
    if run is None:
        return Start()
    if checkpoint.finetune:
        return Start(run=run)
    return Start(
        run=run,
        continues=True,
        load_optimizer=not checkpoint.no_load_optim,
        load_random_state=not checkpoint.no_load_rng,
    )


def make_save_folder(save: Path) -> None:
    """Makes it where needed, and finds out now, not after hours of training, whether it can be written to.

    Raises:
        Refused: it cannot.
    """
    try:
        save.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=save):
            pass
    except OSError as error:
        raise Refused(
            f"--save {save}: cannot be written to ({error.strerror}); choose another folder"
        ) from error


def announce_replacement(save: Path) -> None:
    """Notes that the run in a folder is to be removed by :func:`clear_run`, which the job may not live to do."""
    (save / _TO_BE_REPLACED).touch()


def clear_run(save: Path) -> None:
    """Removes the run that a folder holds, for ``--overwrite``; what is not a run's stays."""
    (save / LATEST_FILE).unlink(missing_ok=True)
    for folder in (*save.glob("iter_*"), save / BEST_FOLDER):
        shutil.rmtree(folder, ignore_errors=True)
    adapter = save / ADAPTER_FOLDER
    if adapter.is_symlink():
        adapter.unlink()
    (save / METRICS_FILE).unlink(missing_ok=True)
    (save / _TO_BE_REPLACED).unlink(missing_ok=True)


def prune(newest: Path, keep: int) -> None:
    """Removes the checkpoints before ``newest``, the one just written, until ``keep`` are left.

    Later ones are there when the run was taken up again from an older checkpoint; they are no reason to remove
    what has just been written.
    """
    runs = [path for path in newest.parent.glob("iter_*") if (path / STATE_FILE).is_file()]
    for folder in sorted(path for path in runs if path.name <= newest.name)[:-keep]:
        shutil.rmtree(folder)
