"""What ``inspect`` tells of a training's ``--save`` folder or one of its iterations."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from mindspeed_lora.checkpoint.conversion.file_sizes import disk_use
from mindspeed_lora.checkpoint.formats.mcore_files import find_iteration
from mindspeed_lora.checkpoint.peft.config import CONFIG_FILE
from mindspeed_lora.checkpoint.storage.safetensors_file import SafetensorsFile
from mindspeed_lora.training.run_folder import (
    ADAPTER_FOLDER,
    BEST_FOLDER,
    OPTIMIZER_FOLDER,
    RANDOM_FOLDER,
    STATE_FILE,
    SavedRun,
)


def describe_run(run: SavedRun, folder: Path) -> dict[str, Any]:
    """A checkpoint of a training.

    Keys: ``folder`` and ``iteration`` of the checkpoint that is meant (the newest one), ``iterations`` that the
    folder holds, ``best`` (the iteration of ``best/``); ``version`` of the program; ``layout`` as it was trained;
    ``data`` (``samples`` read, ``documents`` in all, ``seed``, ``global_batch_size``); ``best_eval_loss``,
    ``base_model``; ``holds``: ``adapter``, ``model``, ``data_position``, ``random_states`` (ranks) and
    ``optimizer`` (``files``, ``bytes``, ``parameters``, ``states``), null where there is none.
    """
    state = run.state
    batch = state.get("global_batch_size")
    return {
        "folder": str(run.folder),
        "iteration": run.iteration,
        "iterations": _iterations(folder) if folder != run.folder else [run.iteration],
        "best": _best(folder),
        "version": state.get("version"),
        "layout": state.get("layout"),
        "data": {
            "samples": run.iteration * batch if isinstance(batch, int) else None,
            "documents": state.get("documents"),
            "seed": state.get("seed"),
            "global_batch_size": batch,
        },
        "best_eval_loss": state.get("best_eval_loss"),
        "base_model": state.get("base_model_name"),
        "holds": {
            "adapter": (run.folder / ADAPTER_FOLDER / CONFIG_FILE).is_file(),
            "model": find_iteration(run.folder) is not None,
            "data_position": isinstance(batch, int),
            "random_states": len(list((run.folder / RANDOM_FOLDER).glob("rank_*.safetensors"))) or None,
            "optimizer": _optimizer(run.folder / OPTIMIZER_FOLDER),
        },
    }


def _iterations(save: Path) -> list[int]:
    """The iterations that are whole."""
    return sorted(int(path.parent.name.rpartition("_")[2]) for path in save.glob(f"iter_*/{STATE_FILE}"))


def _best(save: Path) -> int | None:
    file = save / BEST_FOLDER / STATE_FILE
    if not file.is_file():
        return None
    number = json.loads(file.read_text(encoding="utf-8")).get("iteration")
    return int(number) if isinstance(number, int) else None


def _optimizer(folder: Path) -> dict[str, Any] | None:
    """The optimizer's files by their headers."""
    files = [SafetensorsFile(path) for path in sorted(folder.glob("*.safetensors"))]
    if not files:
        return None
    states: dict[str, int] = {}
    for file in files:
        for name, entry in file.entries.items():
            state = name.rpartition("|")[2]
            states[state] = states.get(state, 0) + prod(entry.shape)
    return {
        "files": len(files),
        "bytes": disk_use(folder)[1],
        "parameters": max(states.values(), default=0),
        "states": sorted(states),
    }
