"""Who sees whose files: one folder for all ranks, or one on each node that is made whole there.

Without shared storage a checkpoint is written in pieces, each on the node of the rank that writes it. Before it takes
its place the nodes send each other what they lack, so that every node holds all of it and can be resumed from.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_lora.config.launcher import node_number
from mindspeed_lora.errors import Failed
from mindspeed_lora.parallel.collectives import all_gather_objects, barrier, broadcast_object, together
from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.parallel.whereabouts import ranks_text

_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Storage:
    """Which ranks make folders, each for those that see its files."""

    rank: int
    leader: int
    """The rank whose folder this rank writes into."""
    leaders: tuple[int, ...] = (0,)
    """One for each storage, rank 0 first."""
    group: dist.ProcessGroup | None = None
    """Of the leaders, over gloo; None where there is one storage."""

    @property
    def leads(self) -> bool:
        """Whether this rank makes the folder that it writes into."""
        return self.rank == self.leader


def find_storage(save: Path, groups: ParallelGroups, no_shared_storage: bool) -> Storage:
    """Finds out by a file of rank 0 who sees it in ``--save``; every rank calls it.

    Raises:
        Failed: some ranks do not, and ``--no-shared-storage`` is not given.
    """
    if groups.world_size == 1:
        return Storage(0, 0)
    probe = broadcast_object(f".seen-{secrets.token_hex(8)}", groups)
    together(groups, lambda: (save / probe).touch() if groups.is_main else None)
    mine = (save / probe).exists(), node_number(os.environ) or socket.gethostname()
    found = all_gather_objects(mine, groups)
    if groups.is_main:
        (save / probe).unlink(missing_ok=True)
    apart = [rank for rank, (sees, _) in enumerate(found) if not sees]
    if not apart:
        return Storage(groups.rank, 0)
    if not no_shared_storage:
        text = (
            f"--save {save}: files that rank 0 writes there are not seen by {ranks_text(apart)}; name a folder that "
            "all nodes share, or give --no-shared-storage, by which each node keeps whole checkpoints of its own"
        )
        together(groups, lambda: _fail(text) if groups.is_main else None)
    nodes = [node for _, node in found]
    own = [
        0 if sees else next(r for r in apart if nodes[r] == nodes[rank])
        for rank, (sees, _) in enumerate(found)
    ]
    leaders = tuple(sorted(set(own)))
    group = dist.new_group(list(leaders), backend="gloo", timeout=groups.timeout)
    return Storage(groups.rank, own[groups.rank], leaders, group if groups.rank in leaders else None)


def _fail(text: str) -> None:
    raise Failed(text)


def folder_of_leader(storage: Storage, folder: Path | None, groups: ParallelGroups) -> Path:
    """The folder that this rank's leader has made; leaders give theirs, and every rank calls it."""
    return Path(all_gather_objects(str(folder) if folder is not None else "", groups)[storage.leader])


def complete_folders(folder: Path, storage: Storage, groups: ParallelGroups) -> None:
    """Leaders send each other the files that the others lack; every rank calls it and waits for the end."""
    if len(storage.leaders) == 1:
        return
    errors: list[Exception] = []
    if storage.group is not None:
        for sender in storage.leaders:
            _send_files(folder, sender, storage, errors)
    together(groups, lambda: _raise_first(errors))
    barrier(groups)


def _send_files(folder: Path, sender: int, storage: Storage, errors: list[Exception]) -> None:
    """All files of one leader, to all others; what fails is noted, and the sending goes on for the others."""
    own = storage.rank == sender
    listed = [
        (str(path.relative_to(folder)), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if own and path.is_file()
    ]
    box = [listed]
    dist.broadcast_object_list(box, src=sender, group=storage.group)
    for name, size in box[0]:
        wanted = not own and not (folder / name).exists()
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            file = (folder / name).open("rb" if own else "wb") if own or wanted else None
        except OSError as error:
            errors.append(error)
            file = None
        for start in range(0, size, _CHUNK_BYTES):
            chunk = torch.zeros(min(_CHUNK_BYTES, size - start), dtype=torch.uint8)
            view = memoryview(chunk.numpy())  # type: ignore[arg-type]
            if own and file is not None:
                _noting(errors, lambda file=file, view=view: _read_into(file, view))  # type: ignore[misc]
            dist.broadcast(chunk, src=sender, group=storage.group)
            if wanted and file is not None:
                _noting(errors, lambda file=file, view=view: file.write(view))  # type: ignore[misc]
        if file is not None:
            file.close()


def _read_into(file: Any, view: memoryview) -> None:
    if file.readinto(view) != len(view):
        raise Failed(f"{file.name}: has become shorter while it was sent")


def _noting(errors: list[Exception], work: Callable[[], object]) -> None:
    try:
        work()
    except (OSError, Failed) as error:
        errors.append(error)


def _raise_first(errors: list[Exception]) -> None:
    if errors:
        raise errors[0]


def check_same_start(iteration: int | None, groups: ParallelGroups) -> None:
    """All ranks go on after the same iteration, or all start anew (None).

    Raises:
        Failed: they do not, as where one node's storage holds an older checkpoint than another's.
    """
    found = all_gather_objects(iteration, groups)
    if len(set(found)) == 1:
        return
    told = "; ".join(
        f"{ranks_text(r for r, one in enumerate(found) if one == each)} "
        + ("without a checkpoint" if each is None else f"after iteration {each}")
        for each in sorted(set(found), key=lambda one: -1 if one is None else one)
    )
    text = (
        f"the ranks do not start from the same checkpoint ({told}); copy the folder --save of the node with the newest "
        "one to the other nodes"
    )
    together(groups, lambda: _fail(text) if groups.is_main else None)
