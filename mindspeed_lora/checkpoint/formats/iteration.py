"""Megatron's folder of iterations: ``latest_checkpointed_iteration.txt`` beside ``iter_%07d`` folders."""

from __future__ import annotations

from pathlib import Path

from mindspeed_lora.errors import Refused

LATEST_FILE = "latest_checkpointed_iteration.txt"


def iteration_folder(folder: Path, iteration: int) -> Path:
    """The folder of one iteration within a checkpoint folder."""
    return folder / f"iter_{iteration:07d}"


def latest_iteration(folder: Path) -> Path:
    """The iteration folder that ``latest_checkpointed_iteration.txt`` names, which must exist."""
    file = folder / LATEST_FILE
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    if text == "release":
        found = folder / "release"
    elif text.isascii() and text.isdigit():
        found = iteration_folder(folder, int(text))
    else:
        raise Refused(f"{file}: found '{text[:40]}'; expected an iteration number.")
    if not found.is_dir():
        raise Refused(f"{file} names iteration {text}, but {found.name} is not there.")
    return found
