"""The writing engine: a plan of files and of the tensors that go into them, carried out by several threads.

A plan is made from names, dtypes and shapes alone, before anything is read: every byte of every file has its place.
A :class:`Shard` is a group of files that are written together (the tensor-parallel ranks of a pipeline stage, one
safetensors file); a canonical tensor, or a slice of its rows, is read once for it, cut, written and forgotten. Peak
memory is what the workers hold, each one tensor or slice and its parts. When a shard's files are on disk, the journal
says so, and a conversion that was killed goes on after it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_lora.checkpoint.storage.manifest import from_json, to_json, write_manifest
from mindspeed_lora.checkpoint.storage.tensor_writer import FileLayout, FileRecord, TensorWriter

if TYPE_CHECKING:
    import torch

    from mindspeed_lora.models.families.segments import Range
    from mindspeed_lora.quantization.matrix import QuantizedMatrix

    Read = torch.Tensor | Sequence[QuantizedMatrix]
    """A canonical tensor or rows of it; of a quantised weight the matrices that it is made of."""

Observer = Callable[[str, "Range | None", "Read"], None]
"""Sees each canonical tensor as it is read, or the rows that were read of it; several threads call it."""

JOURNAL_FILE = ".journal.jsonl"
DEFAULT_WORKERS = 2
_CLOSERS = 4


@dataclass(frozen=True)
class Part:
    """What a file gets of a canonical tensor."""

    file: int
    """Index of the file in its shard."""
    name: str
    """The tensor's name in that file."""
    tensor: torch.Tensor
    at: int | None = None
    """Where it is not the whole of that tensor: number of the value that it begins at; other parts bring the rest."""


@dataclass(frozen=True)
class PlannedTensor:
    """A canonical tensor, or a slice of one, that is read once, and its parts."""

    name: str
    """Canonical name."""
    read: Callable[[], Read]
    parts: Callable[[Any], Iterable[Part]]
    """Takes what was read."""
    rows: Range | None = None
    """Of the canonical tensor, where it is a slice."""


@dataclass(frozen=True)
class Shard:
    """Files that are written together, and the tensors that they are made of.

    Slices of one tensor follow each other; one worker takes them in their order.
    """

    files: Mapping[str, FileLayout]
    """By path relative to the target folder."""
    tensors: Sequence[PlannedTensor]


@dataclass(frozen=True)
class WritePlan:
    """All that a conversion writes."""

    shards: Sequence[Shard]
    finish: Callable[[Path], None] = field(default=lambda folder: None)
    """Writes the small files beside the weights into the target folder: configuration, index, iteration."""

    @property
    def files(self) -> dict[str, int]:
        """Size in bytes of every file of weights, by path relative to the target folder."""
        return {path: layout.num_bytes for shard in self.shards for path, layout in shard.files.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all files of weights."""
        return sum(self.files.values())


class Journal:
    """Which shards are on disk, in a file of the folder that is being written.

    Its first line is the fingerprint of the conversion, each further one a shard with the records of its files.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.path = folder / JOURNAL_FILE
        self.done: dict[int, dict[str, FileRecord]] = {}
        lines = _lines(self.path)
        if lines[:1] == [fingerprint]:
            for line in lines[1:]:
                shard = json.loads(line)
                self.done[shard["shard"]] = {path: from_json(one) for path, one in shard["files"].items()}
        else:
            self._append(fingerprint)

    def add(self, number: int, records: Mapping[str, FileRecord]) -> None:
        """Note a shard whose files are flushed to disk."""
        files = {path: to_json(record) for path, record in records.items()}
        self._append(json.dumps({"shard": number, "files": files}))
        self.done[number] = dict(records)

    def close(self) -> None:
        """Remove the journal: everything is written."""
        self.path.unlink()

    def _append(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def journal_fingerprint(folder: Path) -> str | None:
    """The fingerprint of the conversion that was writing a folder, if it has a journal."""
    return next(iter(_lines(folder / JOURNAL_FILE)), None)


def _lines(path: Path) -> list[str]:
    """The whole lines of a journal; a kill may have cut the last one."""
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return lines


def execute(
    plan: WritePlan,
    folder: Path,
    workers: int = DEFAULT_WORKERS,
    observe: Observer | None = None,
    fingerprint: str = "",
) -> None:
    """Write everything that is planned, and the manifest, into a temporary folder that the caller moves into place.

    Args:
        plan: what to write.
        folder: holds the finished shards of a killed conversion of the same fingerprint, or nothing.
        workers: threads, each with one tensor at a time.
        observe: sees what is read.
        fingerprint: names the conversion, so that no other one goes on with its shards.
    """
    journal = Journal(folder, fingerprint)
    with (
        _threads_shared_by(workers),
        ThreadPoolExecutor(workers, "convert") as pool,
        ThreadPoolExecutor(_CLOSERS, "flush") as closers,
    ):
        closing: list[_Closing] = []
        try:
            for number, shard in enumerate(plan.shards):
                if number in journal.done and _is_whole(folder, journal.done[number]):
                    continue
                # The next shard is made while this one is flushed to disk.
                writers = _fill(shard, folder, pool, workers, observe)
                closing.append(
                    _Closing(number, {path: closers.submit(one.close) for path, one in writers.items()})
                )
                if len(closing) > 1:
                    closing.pop(0).note(journal)
        finally:
            # Also after a failure: what is finished need not be written again.
            for one in closing:
                one.note(journal)
    records = {path: record for files in journal.done.values() for path, record in files.items()}
    plan.finish(folder)
    write_manifest(folder, records)
    journal.close()


@contextmanager
def _threads_shared_by(workers: int) -> Iterator[None]:
    """Threads that begin within it share torch's threads out: more than there are cores would wait busily."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Closing:
    """A shard whose files are being flushed to disk."""

    number: int
    files: Mapping[str, Future[FileRecord]]

    def note(self, journal: Journal) -> None:
        """Wait for it, and note it."""
        journal.add(self.number, {path: record.result() for path, record in self.files.items()})


def _is_whole(folder: Path, records: Mapping[str, FileRecord]) -> bool:
    """Whether the files of a finished shard are there in full length."""
    return all(
        (folder / path).is_file() and (folder / path).stat().st_size == record.num_bytes
        for path, record in records.items()
    )


def _fill(
    shard: Shard,
    folder: Path,
    pool: ThreadPoolExecutor,
    workers: int,
    observe: Observer | None,
) -> dict[str, TensorWriter]:
    """Write the tensors of a shard; its files are still to be closed."""
    with ExitStack() as stack:
        writers = {path: _open(folder / path, layout, stack) for path, layout in shard.files.items()}
        tensors = _Queue(shard.tensors)
        jobs = [pool.submit(_work, tensors, list(writers.values()), observe) for _ in range(workers)]
        done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
        if any(job.exception() is not None for job in done):
            tensors.stop()
        for job in jobs:
            job.result()
        stack.pop_all()
        return writers


def _open(path: Path, layout: FileLayout, stack: ExitStack) -> TensorWriter:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = TensorWriter(path, layout)
    stack.callback(writer.abandon)
    return writer


class _Queue:
    """Hands the tensors of a shard to the workers, all slices of one to the same, until one of them fails."""

    def __init__(self, tensors: Sequence[PlannedTensor]) -> None:
        self._left = iter([list(slices) for _, slices in groupby(tensors, lambda one: one.name)])
        self._lock = threading.Lock()
        self.stopped = False

    def take(self) -> list[PlannedTensor]:
        with self._lock:
            return [] if self.stopped else next(self._left, [])

    def stop(self) -> None:
        self.stopped = True


def _work(
    tensors: _Queue,
    writers: Sequence[TensorWriter],
    observe: Observer | None,
) -> None:
    while slices := tensors.take():
        for planned in slices:
            if tensors.stopped:
                return
            read = planned.read()
            if observe is not None:
                observe(planned.name, planned.rows, read)
            for part in planned.parts(read):
                writers[part.file].write(part.name, part.tensor, part.at)
            del read
