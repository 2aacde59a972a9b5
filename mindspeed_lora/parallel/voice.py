"""Which rank tells the user that the job has failed.

A rank that dies or fails takes its peers' next collective with it. All of them notice, one must speak: the first
that adds to a counter in the job's store, which is the one whose failure the others only feel.
"""

from __future__ import annotations

import re

import torch.distributed as dist

from mindspeed_lora.errors import Failed, PeerFailure, UserError
from mindspeed_lora.parallel.groups import ParallelGroups

_SPOKEN = "mindspeed_lora/spoken"
_LOST_PEER = ("connection closed", "connection reset", "timed out", "timeout", "broken pipe", "nccl", "gloo")


def speak_or_leave(error: Exception, groups: ParallelGroups) -> Exception:
    """The error that this rank should end with: its own, a sentence about a lost peer, or silence."""
    if isinstance(error, PeerFailure) or groups.world_size == 1:
        return error
    if not _is_first(groups):
        return PeerFailure(groups.rank)
    if isinstance(error, RuntimeError) and not isinstance(error, UserError) and _lost_peer(error):
        # gloo begins with the line of its own source that noticed.
        reason = re.sub(r"^\[\S+:\d+\] ", "", " ".join(str(error).split())).partition(". ")[0]
        return Failed(
            f"lost contact with another process ({reason[:200]}); see which rank ended first and why, then start "
            "again with --resume auto; the last checkpoint is whole"
        )
    return error


def _is_first(groups: ParallelGroups) -> bool:
    """True on the first rank that asks. Where the store went down with rank 0, the next rank speaks."""
    try:
        store = dist.distributed_c10d._get_default_store()
        return bool(store.add(_SPOKEN, 1) == 1)
    except (RuntimeError, ValueError):
        return groups.rank == 1


def _lost_peer(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(sign in text for sign in _LOST_PEER)
