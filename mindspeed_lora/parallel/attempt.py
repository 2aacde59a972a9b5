"""Which attempt of the job this is, where torchrun starts ranks anew in the store of an earlier attempt.

The launcher's store outlives the ranks: what a dead attempt wrote there (addresses, counters) would be taken for the
new one's. And the launchers of several nodes count restarts each for itself. So the ranks agree, before anything else,
on a name of the attempt, under which all keys lie, and on how often the job was started anew.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping, MutableMapping
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from mindspeed_lora.config.launcher import restart_count
from mindspeed_lora.errors import Failed

_ATTEMPT = "MINDSPEED_LORA_ATTEMPT"
_CURRENT = "mindspeed_lora/attempt"
_PATIENCE = timedelta(minutes=10)
_POLL_SECONDS = 0.05


def agree_on_attempt(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets ``TORCHELASTIC_RESTART_COUNT`` to the largest over the ranks, and the attempt's name; every rank calls it.

    Rank 0 names the attempt. Another rank answers under the name that it finds, which may be a dead one's, until rank
    0 has answered it: only a living one does.

    Raises:
        Failed: the other ranks are not there in time.
    """
    rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    own, count = secrets.token_hex(8), restart_count(environ)
    try:
        store = _launchers_store(environ, _PATIENCE)
        agree = _lead(store, own, count, world_size) if rank == 0 else _follow(store, own, count, rank)
    except (RuntimeError, ValueError) as error:
        raise Failed(
            f"the {world_size} ranks of this job did not meet at MASTER_ADDR={environ.get('MASTER_ADDR')} "
            f"MASTER_PORT={environ.get('MASTER_PORT')} ({str(error).splitlines()[0]}); see which of them ended and why"
        ) from error
    environ[_ATTEMPT], environ["TORCHELASTIC_RESTART_COUNT"] = agree


def store_of_attempt(timeout: timedelta, environ: Mapping[str, str] = os.environ) -> Store | None:
    """The launcher's store under the attempt's name; None where no attempt was agreed on."""
    if _ATTEMPT not in environ:
        return None
    return PrefixStore(environ[_ATTEMPT], _launchers_store(environ, timeout))


def _launchers_store(environ: Mapping[str, str], timeout: timedelta) -> Store:
    return TCPStore(environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), is_master=False, timeout=timeout)


def _lead(store: Store, own: str, count: int, world_size: int) -> tuple[str, str]:
    store.set(_CURRENT, own)
    answers = [store.get(f"{own}/rank/{rank}").decode().split() for rank in range(1, world_size)]
    largest = str(max([count, *(int(theirs) for _, theirs in answers)]))
    for name, _ in answers:
        store.set(f"{own}/agreed/{name}", largest)
    return own, largest


def _follow(store: Store, own: str, count: int, rank: int) -> tuple[str, str]:
    answered, deadline = "", time.monotonic() + _PATIENCE.total_seconds()
    while time.monotonic() < deadline:
        current = store.get(_CURRENT).decode()
        if current != answered:
            store.set(f"{current}/rank/{rank}", f"{own} {count}")
            answered = current
        if store.check([f"{current}/agreed/{own}"]):
            return current, store.get(f"{current}/agreed/{own}").decode()
        time.sleep(_POLL_SECONDS)
    raise RuntimeError("rank 0 did not answer")
