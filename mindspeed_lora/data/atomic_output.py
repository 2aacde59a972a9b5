"""Output files that appear whole or not at all: written to a temporary sibling, flushed, then renamed.

Several files that belong together are renamed in one go after all of them are complete, so that an
interrupted run leaves the earlier set as it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from mindspeed_lora.atomic import sync_directory
from mindspeed_lora.errors import Refused


def temporary_sibling(target: Path) -> Path:
    """The path next to ``target`` that is written before it is renamed to ``target``."""
    return target.with_name(f".{target.name}.tmp-{os.getpid()}")


def prepare_folder(folder: Path) -> None:
    """Make ``folder`` and see that files can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"the output folder {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Refused(f"the output folder {folder} cannot be written to: permission denied")


def remove_stale(targets: Iterable[Path]) -> None:
    """Remove what interrupted runs left next to ``targets``, unless the process that writes it is alive."""
    for target in targets:
        for leftover in target.parent.glob(f".{target.name}.tmp-*"):
            if not _is_alive(leftover.name.rpartition("-")[2]):
                leftover.unlink(missing_ok=True)


def _is_alive(process_id: str) -> bool:
    if not process_id.isdigit():
        return False
    try:
        os.kill(int(process_id), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return int(process_id) != os.getpid()


def publish(pairs: Iterable[tuple[Path, Path]]) -> None:
    """Rename each complete ``(temporary, target)`` pair, and make the renames durable."""
    pairs = list(pairs)
    for temporary, target in pairs:
        os.replace(temporary, target)
    for folder in {target.parent for _, target in pairs}:
        sync_directory(folder)
