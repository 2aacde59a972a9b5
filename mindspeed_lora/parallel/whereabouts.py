"""What a thread of this process is doing, read off its stack: the collective that it waits in, and our line."""

from __future__ import annotations

import linecache
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

_COLLECTIVES = dist.distributed_c10d.__file__
_BETWEEN = str(Path(_COLLECTIVES).parent)
"""Folder of what stands between one collective and another that it stands on."""
_PACKAGE = Path(__file__).parents[1]


def waits_in() -> str:
    """The collective that this process stands in, with its ranks, the main thread's first; empty where in none."""
    frames = sys._current_frames()
    main = threading.main_thread().ident
    # Backward passes on a GPU run in threads of the autograd engine.
    threads = sorted(
        (number for number in frames if number != threading.get_ident()), key=lambda n: n != main
    )
    return next((found for number in threads if (found := _collective(frames[number]))), "")


def our_line() -> str:
    """File, line and function of this package that the main thread is in: ``training/step.py:88 _run``."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    for each in _outward(frame):
        path = Path(each.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            return f"{path.relative_to(_PACKAGE)}:{_line_number(each)} {each.f_code.co_name}"
    return ""


def ranks_text(ranks: Iterable[int]) -> str:
    """``rank 3`` or ``ranks 0-3, 7``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"rank{'s' if sum(map(len, runs)) > 1 else ''} {text}"


def _collective(frame: FrameType) -> str:
    name, ranks = "", ""
    for each in _outward(frame):
        if each.f_code.co_filename == _COLLECTIVES:
            # The outermost one is what was called: all_gather_object stands on all_gather.
            name = each.f_code.co_name
            ranks = _ranks_of(each.f_locals.get("group")) if "group" in each.f_locals else ""
        elif name and not each.f_code.co_filename.startswith(_BETWEEN):
            break
    if name:
        return f"{name}{f' over {ranks}' if ranks else ''}"
    line = linecache.getline(frame.f_code.co_filename, _line_number(frame))
    return f"the end of a collective ({line.strip()})" if ".wait()" in line else ""


def _line_number(frame: FrameType) -> int:
    """Of its function where it stands on an instruction of no line, which Python says with None."""
    return frame.f_lineno or frame.f_code.co_firstlineno


def _ranks_of(group: Any) -> str:
    try:
        ranks: Sequence[int] = dist.get_process_group_ranks(group or dist.group.WORLD)
    except (RuntimeError, ValueError, KeyError, TypeError):
        return ""
    return ranks_text(ranks)


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
