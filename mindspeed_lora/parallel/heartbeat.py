"""Heartbeats of the ranks, and the one summary of a job in which a rank stands still.

Each rank has a thread that tells the job's store, every few seconds, where the rank is: step, phase, and the
collective that it waits in. When a collective runs into its time-out, the rank that speaks for all reads what every
rank told last: whose beats have stopped is stopped or gone, who is in no collective is what the others wait for.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from mindspeed_lora.config.launcher import has_launchers_store
from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.parallel.process_identity import has_ended, this_process
from mindspeed_lora.parallel.whereabouts import our_line, ranks_text, waits_in

T = TypeVar("T")

AFTER_TRAINING = "the last checkpoint is whole, start again with --resume auto"
AFTER_ANSWERS = "what is written is whole, start again"
"""What a job that has failed leaves behind."""

SPOKEN = "mindspeed_lora/spoken"
"""Counter of the ranks that wanted to speak; the first one does."""
TOLD = "mindspeed_lora/told"
"""Counter that is raised once the speaker has asked all that it wanted to know."""
_KEY = "mindspeed_lora/beat"
_SHORTEST, _LONGEST = 0.25, 5.0
_LOOK = 0.05
_FAREWELL = 2.0
_ANSWER = timedelta(seconds=10)


@dataclass(frozen=True)
class Beat:
    """What a rank told last."""

    number: int
    """Of its beats; the same twice: it has stopped telling."""
    step: int | None
    phase: str
    waits: str
    """The collective that it waits in; empty in none."""
    line: str
    """Our line that it is in."""
    process: str = ""
    """As :func:`this_process` tells it."""
    leaves: bool = False
    """It has noticed that the job has failed, and ends by itself."""

    @property
    def place(self) -> str:
        """Step and phase in words."""
        return _place(self.step, self.phase)


def _place(step: int | None, phase: str) -> str:
    return f"step {step}, {phase}" if step is not None else phase


class Heartbeat:
    """This rank's beats, from its creation until :meth:`close`; without peers there are none.

    Args:
        groups: the ranks.
        afterwards: what a job that has failed leaves behind, the end of its sentence.
        watches: whether this rank is ended where a phase lasts longer than any collective may. Not for work whose
            phases are long by themselves; the time-out of its collectives ends it.
    """

    def __init__(
        self, groups: ParallelGroups, afterwards: str = AFTER_TRAINING, watches: bool = True
    ) -> None:
        self.afterwards = afterwards
        self._watches = watches
        self._groups = groups
        self._timeout = groups.timeout.total_seconds()
        self._interval = min(max(self._timeout / 10, _SHORTEST), _LONGEST)
        self._step: int | None = None
        self._phase = "start"
        self._marked = time.monotonic()
        self._number = 0
        self._ended = threading.Event()
        self._leaves = False
        self._place = "", ""
        self._process = this_process()
        self._store: Any = None
        if groups.world_size > 1:
            self._store = _own_connection()
            self._publish()
            threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def mark(self, phase: str, step: int | None = None) -> None:
        """Note what begins now; ``step`` is kept where none is given."""
        self._phase, self._marked = phase, time.monotonic()
        if step is not None:
            self._step = step

    @property
    def phase(self) -> str:
        """What has begun last."""
        return self._phase

    @property
    def step(self) -> int | None:
        """The step that goes on."""
        return self._step

    def leave(self) -> None:
        """This rank knows that the job has failed, and tells so: it goes on beating, and nobody has to end it."""
        self._leaves = True
        if self._store is not None:
            with suppress(RuntimeError, ValueError, TimeoutError):
                bounded(self._publish, _FAREWELL)

    def close(self) -> None:
        """No more beats."""
        self._ended.set()

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def summary(self) -> str:
        """Which ranks stand still, where, and who waits for them; takes a few seconds."""
        store = self._store
        if store is None:
            return ""
        try:
            before = bounded(lambda: _read_all(store, self._groups.world_size))
            time.sleep(2 * self._interval)
            now = bounded(lambda: _read_all(store, self._groups.world_size))
        except (RuntimeError, ValueError, TimeoutError):
            return "rank 0 or its launcher, which keeps the job's store, does not answer"
        silent = {rank for rank, beat in now.items() if beat.number == before[rank].number} - {
            self._groups.rank
        }
        return summarise(now, silent)

    def lost(self) -> str:
        """Which ranks have gone without a word, and in which step; empty where none has.

        On this node their processes tell, at once; of other nodes the beats that have stopped, after a few seconds.
        The step is this rank's: their own last beat may be older than it.
        """
        store = self._store
        if store is None:
            return ""
        until = time.monotonic() + 2 * self._interval
        try:
            before = bounded(lambda: _read_all(store, self._groups.world_size))
            while True:
                ended = {rank for rank, beat in before.items() if has_ended(beat.process)}
                over = time.monotonic() > until
                if ended or over:
                    # Asked after they were seen to have ended: who left by itself has told so before.
                    now = bounded(lambda: _read_all(store, self._groups.world_size))
                    silent = {rank for rank in now if over and now[rank].number == before[rank].number}
                    gone = {rank for rank in ended | silent if not now[rank].leaves} - {self._groups.rank}
                    if gone or over:
                        break
                time.sleep(_LOOK)
        except (RuntimeError, ValueError, TimeoutError):
            return "rank 0 or its launcher, which keeps the job's store"
        return f"{ranks_text(gone)} in {_place(self._step, self._phase)}" if gone else ""

    def told(self) -> None:
        """This rank speaks for all, and has asked all that it wanted to know."""
        if self._store is not None:
            with suppress(RuntimeError, ValueError, TimeoutError):
                bounded(lambda: self._store.add(TOLD, 1), _FAREWELL)

    def wait_for_the_speaker(self) -> None:
        """Rank 0 keeps the job's store where no launcher does: it stays until the rank that speaks has asked it."""
        if self._store is None or self._groups.rank != 0 or has_launchers_store(os.environ):
            return
        until = time.monotonic() + 2 * self._interval + _FAREWELL
        with suppress(RuntimeError, ValueError):
            while self._store.add(TOLD, 0) == 0 and time.monotonic() < until:
                time.sleep(_LOOK)

    def _publish(self) -> None:
        self._number += 1
        if not self._leaves:
            # One that leaves has come out of its collective already, and tells where it was.
            self._place = waits_in(), our_line()
        beat = [self._number, self._step, self._phase, *self._place, self._process, self._leaves]
        self._store.set(f"{_KEY}/{self._groups.rank}", json.dumps(beat))

    def _beat(self) -> None:
        """The life of the thread."""
        over = False
        while not self._ended.wait(self._interval):
            stands = time.monotonic() - self._marked
            try:
                self._publish()
                over = self._store.add(SPOKEN, 0) > 0
            except (RuntimeError, ValueError):
                over = True
            if self._leaves or not self._watches:
                continue
            if over and stands > self._timeout + self._interval:
                # Another rank has spoken, and this one has no way to notice.
                os._exit(1)
            if stands > 2 * self._timeout and waits_in() and not self._ended.is_set():
                self._speak()

    def _speak(self) -> None:
        """Where a collective has no time-out that works."""
        if self._store.add(SPOKEN, 1) == 1:
            text = f"error: rank {self._groups.rank}: {hang_sentence(self.summary(), self._timeout, self.afterwards)}"
            print(text, file=sys.stderr, flush=True)
        os._exit(1)


def for_answers(groups: ParallelGroups) -> Heartbeat:
    """The beats of a rank that answers and judges: nothing that it does is marked often, or can be resumed."""
    return Heartbeat(groups, AFTER_ANSWERS, watches=False)


def hang_sentence(summary: str, timeout_seconds: float, afterwards: str = AFTER_TRAINING) -> str:
    """The whole sentence of a job that stands still."""
    minutes = f"no progress within --distributed-timeout-minutes {timeout_seconds / 60:g}"
    told = f": {summary}" if summary else ""
    return f"{minutes}{told}; {afterwards}"


def summarise(beats: Mapping[int, Beat], silent: set[int]) -> str:
    """Who stands still and who waits, by what the ranks told last; ``silent`` have stopped telling."""
    parts: dict[tuple[int, str], list[int]] = defaultdict(list)
    for rank, beat in beats.items():
        if rank in silent:
            last = f"waiting in {beat.waits}" if beat.waits else f"at {beat.line}"
            text = f"no more signs of life (stopped, or its node is gone) since {beat.place}, {last}"
            parts[0, text].append(rank)
        elif beat.waits:
            parts[2, f"waiting in {beat.waits} ({beat.place})"].append(rank)
        else:
            parts[1, f"in no collective: {beat.place}, at {beat.line}"].append(rank)
    return "; ".join(f"{ranks_text(ranks)}: {text}" for (_, text), ranks in sorted(parts.items()))


def bounded(work: Callable[[], T], seconds: float = _ANSWER.total_seconds()) -> T:
    """The result of something that may never return.

    Raises:
        TimeoutError: it has not returned in time, and is left behind in its thread.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"not within {seconds:g} s")
    return results[0]


def _read_all(store: Any, world_size: int) -> dict[int, Beat]:
    told = store.multi_get([f"{_KEY}/{rank}" for rank in range(world_size)])
    return {rank: Beat(*json.loads(text)) for rank, text in enumerate(told)}


def _own_connection() -> Any:
    """The job's store over a connection of its own: the main thread may be waiting in the other one."""
    default: Any = dist.distributed_c10d._get_default_store()
    store = default.clone()
    store.set_timeout(_ANSWER)
    return store
