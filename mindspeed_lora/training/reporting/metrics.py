"""``metrics.jsonl``: one JSON object a line, a line a step or an evaluation.

A line is in the file, whole, when its step has ended, so that a kill loses none; a line that a full disk
refused waits and is written with the next.  On resume the lines of later iterations, and one that a kill cut
short, are taken away by replacing the file in one step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mindspeed_lora.atomic import atomic_file
from mindspeed_lora.errors import Refused

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics file, in order; what is no object with an iteration is passed over."""
    for line in path.read_bytes().splitlines(keepends=True):
        record = _parse(line)
        if record is not None:
            yield record


class MetricsFile:
    """The metrics of a run, open for appending after iteration ``resumed_iteration``."""

    def __init__(self, save: Path, resumed_iteration: int) -> None:
        """Open (and make) ``<save>/metrics.jsonl``; a run that starts at iteration 0 begins an empty one."""
        self.path = save / METRICS_FILE
        self._waiting: list[bytes] = []
        try:
            save.mkdir(parents=True, exist_ok=True)
            _cut(self.path, resumed_iteration)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._length = os.fstat(self._file).st_size
        except OSError as error:
            raise Refused(
                f"--save {save}: {METRICS_FILE} cannot be written ({error.strerror}); "
                "make the folder writable or give another one"
            ) from error

    @property
    def waiting(self) -> int:
        """Lines that could not be written yet."""
        return len(self._waiting)

    def append(self, record: dict[str, Any]) -> OSError | None:
        """Write a line; the error, if it and those that wait could not be written."""
        self._waiting.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        return self.flush()

    def flush(self) -> OSError | None:
        """Write the lines that wait; the error, if there still is one."""
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.pop(0)
        except OSError as error:
            return error
        return None

    def sync(self) -> OSError | None:
        """Flush the file to the disk, so that it is not behind a checkpoint after a power cut."""
        try:
            os.fsync(self._file)
        except OSError as error:
            return error
        return None

    def close(self) -> None:
        """Close the file; harmless when closed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, line: bytes) -> None:
        """Append a line or nothing."""
        try:
            written = os.write(self._file, line)
            if written < len(line):
                os.write(self._file, line[written:])
            self._length += len(line)
        except OSError:
            os.ftruncate(self._file, self._length)
            raise


def _cut(path: Path, resumed_iteration: int) -> None:
    """Keep the lines up to the resumed iteration."""
    if not path.is_file():
        return
    old = path.read_bytes()
    lines = old.splitlines(keepends=True) if resumed_iteration > 0 else []
    kept = b"".join(line for line in lines if _belongs(line, resumed_iteration))
    if kept != old:
        with atomic_file(path) as temporary:
            temporary.write_bytes(kept)


def _belongs(line: bytes, resumed_iteration: int) -> bool:
    record = _parse(line)
    return record is not None and record["iteration"] <= resumed_iteration


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line's object; None for one without its end, or that is no object with an iteration."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("iteration"), int)
    return record if whole else None
