"""Optimizer state on disk: masters and moments by canonical parameter name, readable in any layout.

Each rank writes the slices that it owns, ``<name>|<state>`` flat float32, with a table (in the file's metadata)
of what part of the whole tensor each slice is. A reader takes its own slice from all slices that overlap it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mindspeed_lora.checkpoint.storage.safetensors_writer import SafetensorsWriter
from mindspeed_lora.errors import Failed
from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.training.optimizer import AdamW
from mindspeed_lora.training.optimizer_states import MOMENTS
from mindspeed_lora.training.shard_slice import ShardSlice

STATES = ("master", *MOMENTS)
_TABLE = "slices"


def write_optimizer(folder: Path, optimizer: AdamW, groups: ParallelGroups) -> None:
    """Writes this rank's slices; without the distributed optimizer only one data-parallel rank has to."""
    written = optimizer.written_slices()
    if not written and (optimizer.slices or groups.dp_cp_rank > 0):
        return
    pieces = [(owned, list(ShardSlice.all_of(owned.parameter, owned.start, owned.stop))) for owned in written]
    table = {
        piece.name: {key: value for key, value in vars(piece).items() if key != "name"}
        for _, own in pieces
        for piece, _, _ in own
    }
    specs = {
        f"{piece.name}|{state}": (torch.float32, (last - first,))
        for _, own in pieces
        for piece, first, last in own
        for state in STATES
    }
    name = f"tp{groups.tp_rank:02d}_pp{groups.pp_rank:03d}_dp{groups.dp_cp_rank:03d}.safetensors"
    with SafetensorsWriter(folder / name, specs, {_TABLE: json.dumps(table)}) as file:
        # One slice after the other: all of them may be more than memory holds.
        for owned, own in pieces:
            for state, values in optimizer.state_of(owned).items():
                for piece, first, last in own:
                    file.write(f"{piece.name}|{state}", values.detach()[first:last].cpu())
            optimizer.states.rest()


def read_optimizer(folder: Path, optimizer: AdamW, updates_done: int) -> None:
    """Restores every slice that this rank owns, whatever layout wrote the files.

    Each rank does so by itself; when all have, :meth:`AdamW.publish` makes the masters the model's values.

    Raises:
        Failed: a file is damaged, or a parameter's state is missing.
    """
    with ExitStack() as stack:
        try:
            pieces = _open_all(folder, stack)
            # Also where this rank owns nothing, as one without an adapter does.
            optimizer.updates_done = updates_done
            for owned in optimizer.slices:
                wanted = [
                    piece for piece, _, _ in ShardSlice.all_of(owned.parameter, owned.start, owned.stop)
                ]
                state = {
                    key: _joined([_read(pieces, piece, key, folder) for piece in wanted]) for key in STATES
                }
                optimizer.restore(owned, state, updates_done)
                optimizer.states.rest()
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise Failed(
                f"{folder}: the optimizer state cannot be read ({error}); resume from an older checkpoint, "
                "or give --no-load-optim"
            ) from error


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class _Piece:
    slice: ShardSlice
    file: Any


def _open_all(folder: Path, stack: ExitStack) -> dict[str, list[_Piece]]:
    """The pieces of every parameter over all files."""
    found: dict[str, list[_Piece]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = stack.enter_context(safe_open(path, framework="pt"))
        for piece in _table(file):
            found.setdefault(piece.name, []).append(_Piece(piece, file))
    return found


def _table(file: Any) -> Iterator[ShardSlice]:
    for name, entry in json.loads(file.metadata()[_TABLE]).items():
        yield ShardSlice(
            name=name,
            shape=tuple(entry["shape"]),
            axis=entry["axis"],
            ranges=tuple((start, stop) for start, stop in entry["ranges"]),
            start=entry["start"],
            stop=entry["stop"],
        )


def _read(pieces: dict[str, list[_Piece]], wanted: ShardSlice, state: str, folder: Path) -> torch.Tensor:
    key = f"{wanted.name}|{state}"
    for piece in pieces.get(wanted.name, []):
        if piece.slice == wanted:
            found: torch.Tensor = piece.file.get_tensor(key)
            return found
    values = torch.zeros(wanted.stop - wanted.start)
    known = torch.zeros(len(values), dtype=torch.bool)
    for piece in pieces.get(wanted.name, []):
        if piece.slice.is_of(wanted):
            wanted.take(piece.slice, piece.file.get_tensor(key), values, known)
    if not bool(known.all()):
        raise Failed(
            f"{folder}: the {state} of {wanted.name} {list(wanted.shape)} is not (wholly) there; "
            "resume from another checkpoint, or give --no-load-optim"
        )
    return values
