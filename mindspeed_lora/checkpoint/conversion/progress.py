"""What a conversion tells while it runs, and its count of values that are not finite."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

import torch

from mindspeed_lora.checkpoint.canonical import canonical_tensors
from mindspeed_lora.checkpoint.source import Source
from mindspeed_lora.checkpoint.storage.tensor_writer import spec_bytes
from mindspeed_lora.models.families.segments import Range

if TYPE_CHECKING:
    from mindspeed_lora.checkpoint.engine import Read

_INTERVAL_SECONDS = 10.0
_CHUNK_VALUES = 1 << 22
_TERMINAL_INTERVAL_SECONDS = 0.2


class Progress:
    """Counts the tensors that pass and prints a line: in place on a terminal, else every 10 s.

    Several threads may call it.
    """

    def __init__(self, source: Source) -> None:
        self._lock = threading.Lock()
        sizes = canonical_tensors(source.shape)
        self.total_bytes = sum(spec_bytes((source.dtype(name), size)) for name, size in sizes.items())
        self.total_tensors = len(sizes)
        self.not_finite: dict[str, int] = {}
        """Number of NaN or infinite values by canonical name."""
        self._done: set[str] = set()
        self._seen: set[tuple[str, Range | None]] = set()
        self._done_bytes = 0
        self._started = self._printed = time.monotonic()
        self._terminal = sys.stdout.isatty()

    def __call__(self, name: str, rows: Range | None, read: Read) -> None:
        """Note a tensor, or some of its rows, that was read and is about to be written.

        Quantised matrices, whose values are finite, count with the bytes of those.
        """
        with self._lock:
            if (name, rows) in self._seen:
                return
            self._seen.add((name, rows))
            self._done.add(name)
        if isinstance(read, torch.Tensor):
            count, size = count_not_finite(read), read.numel() * read.element_size()
        else:
            count, size = 0, sum(prod(one.shape) * one.dtype.itemsize for one in read)
        with self._lock:
            self._done_bytes += size
            if count:
                self.not_finite[name] = self.not_finite.get(name, 0) + count
            now = time.monotonic()
            interval = _TERMINAL_INTERVAL_SECONDS if self._terminal else _INTERVAL_SECONDS
            if now - self._printed >= interval:
                self._printed = now
                self._print(now - self._started)

    def finish(self, path: object, num_bytes: int, made_infinite: Mapping[str, int] | None = None) -> None:
        """Print the last line, with the bytes that were written, and a warning where values are not finite.

        ``made_infinite``: of these, by canonical name, those that were finite in the source.
        """
        seconds = time.monotonic() - self._started
        copied = {name: count - (made_infinite or {}).get(name, 0) for name, count in self.not_finite.items()}
        copied = {name: count for name, count in copied.items() if count > 0}
        if copied:
            first, count = next(iter(copied.items()))
            total = sum(copied.values())
            print(
                f"warning: {total} NaN or infinite values in {len(copied)} tensors, copied as they "
                f"are ({count} in {first})",
                file=sys.stderr,
            )
        clear = "\r\x1b[K" if self._terminal else ""
        size = readable_size(num_bytes)
        print(f"{clear}wrote {path}: {self.total_tensors} tensors, {size}, {seconds:.1f} s", flush=True)

    def _print(self, seconds: float) -> None:
        rate = self._done_bytes / seconds
        remaining = max(0, self.total_bytes - self._done_bytes) / rate if rate else 0.0
        line = (
            f"{len(self._done)}/{self.total_tensors} tensors, {readable_size(self._done_bytes)} of "
            f"{readable_size(self.total_bytes)}, {readable_size(rate)}/s, {remaining:.0f} s left"
        )
        print(f"\r\x1b[K{line}" if self._terminal else line, end="" if self._terminal else "\n", flush=True)


def count_not_finite(tensor: torch.Tensor) -> int:
    """Number of NaN and infinite values of a tensor of any shape.

    A sum needs no memory and is finite only if every value is; only else the values are looked at one by one.
    """
    if math.isfinite(float(tensor.sum())):
        return 0
    chunks = tensor.reshape(-1).split(_CHUNK_VALUES)
    return sum(int(chunk.numel() - torch.isfinite(chunk).sum()) for chunk in chunks)


def readable_size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
