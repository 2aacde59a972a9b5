"""Which rank tells the user that the job has failed.

A rank that dies or fails takes its peers' next collective with it. All of them notice, one must speak: the first
that adds to a counter in the job's store, which is the one whose failure the others only feel.
"""

from __future__ import annotations

import re

import torch.distributed as dist

from mindspeed_lora.errors import Failed, PeerFailure, UserError
from mindspeed_lora.parallel.collectives import barrier
from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.parallel.heartbeat import (
    AFTER_TRAINING,
    SPOKEN,
    TOLD,
    Heartbeat,
    bounded,
    hang_sentence,
)

_LOST_PEER = ("connection closed", "connection reset", "timed out", "timeout", "broken pipe", "nccl", "gloo")
_TIMED_OUT = ("timed out", "timeout")


def speak_or_leave(error: Exception, groups: ParallelGroups, heartbeat: Heartbeat | None = None) -> Exception:
    """The error that this rank should end with: its own, a sentence about a lost peer, or silence.

    ``heartbeat`` tells which rank the others wait for, where a collective has run into its time-out.
    """
    if heartbeat is not None:
        heartbeat.leave()
    if isinstance(error, PeerFailure) or groups.world_size == 1:
        return error
    if not _is_first(groups):
        if heartbeat is not None:
            heartbeat.wait_for_the_speaker()
        return PeerFailure(groups.rank)
    told = _spoken(error, groups, heartbeat)
    if heartbeat is not None:
        heartbeat.told()
    return told


def forget_failure(groups: ParallelGroups) -> None:
    """Before another piece of work in processes that stay joined: what an earlier one ended with is over.

    Every rank calls it.
    """
    if groups.rank == 0 and groups.world_size > 1:
        store = dist.distributed_c10d._get_default_store()
        for counter in (SPOKEN, TOLD):
            store.set(counter, "0")
    barrier(groups)


def _spoken(error: Exception, groups: ParallelGroups, heartbeat: Heartbeat | None) -> Exception:
    """What the rank that speaks ends with."""
    if isinstance(error, RuntimeError) and not isinstance(error, UserError) and _lost_peer(error):
        if heartbeat is None:
            return Failed(lost_sentence("", str(error)))
        afterwards = heartbeat.afterwards
        if any(sign in str(error).lower() for sign in _TIMED_OUT):
            return Failed(hang_sentence(heartbeat.summary(), groups.timeout.total_seconds(), afterwards))
        return Failed(lost_sentence(heartbeat.lost(), str(error), afterwards))
    return error


def lost_sentence(lost: str, reason: str, afterwards: str = AFTER_TRAINING) -> str:
    """The whole sentence of a job that a rank has left without a word; ``lost`` names it, where it is known."""
    # gloo begins with the line of its own source that noticed.
    seen = re.sub(r"^\[\S+:\d+\] ", "", " ".join(reason.split())).partition(". ")[0]
    what = (
        f"lost contact with {lost}: gone without a word (killed, out of memory, or the node is gone)"
        if lost
        else f"lost contact with another process ({seen[:200]}); see which rank ended first and why"
    )
    return f"{what}; {afterwards}"


def _is_first(groups: ParallelGroups) -> bool:
    """True on the first rank that asks. Where the store went down with rank 0, the next rank speaks."""
    try:
        store = dist.distributed_c10d._get_default_store()
        return bool(bounded(lambda: store.add(SPOKEN, 1)) == 1)
    except (RuntimeError, ValueError, TimeoutError):
        return groups.rank == 1


def _lost_peer(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(sign in text for sign in _LOST_PEER)
