"""Output files that appear whole or not at all: written to a temporary sibling, flushed, then renamed.

Several files that belong together are renamed in one go after all of them are complete, so that an
interrupted run leaves the earlier set as it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mindspeed_lora.atomic import make_folder, remove_empty, sync_directory
from mindspeed_lora.errors import Refused


def temporary_sibling(target: Path, process_id: int | None = None) -> Path:
    """The path next to ``target`` that is written before it is renamed to ``target``, by this process or another."""
    return target.with_name(f".{target.name}.tmp-{process_id or os.getpid()}")


def left_by_the_dead(target: Path) -> list[int]:
    """The processes that wrote a temporary sibling of ``target`` and are no more."""
    endings = (path.name.rpartition("-")[2] for path in target.parent.glob(f".{target.name}.tmp-*"))
    return sorted(int(ending) for ending in endings if ending.isdigit() and not _is_alive(ending))


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Make ``folder`` and see that files can be made in it; one that was made is removed where the work fails.

    Raises:
        Refused: they cannot.
    """
    try:
        made = make_folder(folder)
    except OSError as error:
        raise Refused(f"the output folder {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Refused(f"the output folder {folder} cannot be written to: permission denied")
    try:
        yield
    except BaseException:
        remove_empty(made)
        raise


def remove_stale(targets: Iterable[Path], kept: int | None = None) -> None:
    """Remove what interrupted runs left next to ``targets``, unless the process that writes it is alive.

    What the process ``kept`` left stays: it is gone on with.
    """
    for target in targets:
        for process_id in left_by_the_dead(target):
            if process_id != kept:
                temporary_sibling(target, process_id).unlink(missing_ok=True)


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
