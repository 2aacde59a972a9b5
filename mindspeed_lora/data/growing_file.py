"""A temporary file of records that only grows, and their lengths beside it: what another process can go on with.

A mark is a state on disk. Whoever takes the files over after the process has died gives the mark that they are to be
cut back to, since more may have been written after it.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from mindspeed_lora.data.atomic_output import remove_stale, temporary_sibling

Mark = Mapping[str, int]
"""``bytes`` of the file and ``records`` in it."""


class GrowingFile:
    """Records of bytes, each with a length of the caller's own counting."""

    def __init__(self, target: Path, taken_from: int | None = None, mark: Mark | None = None) -> None:
        """``target`` names the file, whose name it only gets from the caller.

        With ``taken_from``, the number of a dead process, its files are taken over as they were at ``mark``.
        """
        self.path = temporary_sibling(target)
        lengths = target.with_name(f"{target.name}.lengths")
        self._lengths_path = temporary_sibling(lengths)
        remove_stale([target, lengths], kept=taken_from if mark is not None else None)
        self.lengths = array("i")
        self._noted = 0
        if taken_from is not None and mark is not None:
            os.replace(temporary_sibling(target, taken_from), self.path)
            os.replace(temporary_sibling(lengths, taken_from), self._lengths_path)
            self._cut(mark)
        self.stream = _opened(self.path, mark is not None)
        self._lengths_stream = _opened(self._lengths_path, mark is not None)

    def _cut(self, mark: Mark) -> None:
        """Back to the mark."""
        os.truncate(self.path, mark["bytes"])
        os.truncate(self._lengths_path, mark["records"] * self.lengths.itemsize)
        self.lengths.frombytes(self._lengths_path.read_bytes())
        self._noted = len(self.lengths)

    def append(self, content: bytes, length: int) -> None:
        """One record more."""
        self.stream.write(content)
        self.lengths.append(length)

    def mark(self) -> Mark:
        """Everything so far is on disk."""
        self._lengths_stream.write(self.lengths[self._noted :].tobytes())
        self._noted = len(self.lengths)
        for stream in (self.stream, self._lengths_stream):
            flush(stream)
        return {"bytes": self.stream.tell(), "records": len(self.lengths)}

    def close(self) -> None:
        """The file is complete: its lengths are only here."""
        flush(self.stream)
        self.stream.close()
        self._lengths_stream.close()
        self._lengths_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove everything."""
        self.stream.close()
        self._lengths_stream.close()
        self._lengths_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def can_take_over(target: Path, process_id: int, mark: Mark) -> bool:
    """Whether what a dead process left of ``target`` reaches to the mark."""
    lengths = target.with_name(f"{target.name}.lengths")
    sizes = {target: mark["bytes"], lengths: mark["records"] * array("i").itemsize}
    left = {temporary_sibling(path, process_id): size for path, size in sizes.items()}
    return all(path.is_file() and path.stat().st_size >= size for path, size in left.items())


def _opened(path: Path, goes_on: bool) -> BinaryIO:
    return path.open("ab") if goes_on else path.open("wb")


def flush(stream: BinaryIO) -> None:
    """Put what was written on the disk."""
    stream.flush()
    os.fsync(stream.fileno())
