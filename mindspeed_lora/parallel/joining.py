"""Groups for one piece of a program's work, in processes that stay joined for the next piece.

A command joins its processes once and ends. A program may train, then generate: it needs other groups each time, but
the launcher's address serves a world only once.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from megatron.core import parallel_state

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.errors import Refused
from mindspeed_lora.parallel.groups import ParallelGroups, destroy_groups, initialize_groups
from mindspeed_lora.parallel.heartbeat import Heartbeat
from mindspeed_lora.parallel.voice import forget_failure, speak_or_leave


@contextmanager
def joined_groups(
    parallel: ParallelConfig, seed: int, beats: Callable[[ParallelGroups], Heartbeat] = Heartbeat
) -> Iterator[tuple[ParallelGroups, list[str], Heartbeat]]:
    """The groups of the layout, notices for the user, and this rank's beats; all ranks open and close in one order.

    The first call joins the processes, which leave when the program ends. An error inside becomes that of a command:
    one rank raises it, the others raise :class:`~mindspeed_lora.errors.PeerFailure`.

    Raises:
        Refused: groups are open already.
    """
    if parallel_state.model_parallel_is_initialized():
        raise Refused(
            "a trainer or model of this process is still open; close it before another one is opened"
        )
    joins = not dist.is_initialized()
    before = set(_known_groups()) if not joins else set()
    groups, notices = initialize_groups(parallel, seed)
    if joins:
        atexit.register(destroy_groups)
    else:
        forget_failure(groups)
    try:
        with beats(groups) as heartbeat:
            try:
                yield groups, notices, heartbeat
            except Exception as error:
                told = speak_or_leave(error, groups, heartbeat)
                if told is error:
                    raise
                raise told from error
    finally:
        parallel_state.destroy_model_parallel()
        for group in _known_groups():
            if group not in before and group is not dist.group.WORLD:
                dist.destroy_process_group(group)


def _known_groups() -> list[dist.ProcessGroup]:
    """All groups of the process, in the order in which they were made, which is the same on every rank."""
    return list(dist.distributed_c10d._world.pg_map)
