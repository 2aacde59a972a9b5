"""Opening files of rows: packed or not, in UTF-8 or UTF-16, and how far they have been read."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mindspeed_lora.errors import Refused

PACKED = (".gz", ".zst")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def kind_of(file: Path) -> str:
    """The suffix that tells what a file holds, ``.jsonl`` of ``a.jsonl.gz``."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in PACKED:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


@contextmanager
def opened(file: Path) -> Iterator[tuple[io.BufferedReader, Callable[[], float]]]:
    """The bytes of a file, unpacked, and a function that tells which fraction of it has been read.

    Raises:
        Refused: it is not packed as its name says.
    """
    size = max(file.stat().st_size, 1)
    with open(file, "rb") as raw:
        try:
            with _unpacked(file, raw) as stream:
                yield stream, lambda: min(raw.tell() / size, 1.0)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise Refused(f"{file}: not a readable gzip file ({error})") from error
        except OSError as error:
            if file.suffix.lower() != ".zst" or error.errno is not None:
                raise
            raise Refused(f"{file}: not a readable zstd file ({error})") from error


@contextmanager
def _unpacked(file: Path, raw: io.BufferedReader) -> Iterator[io.BufferedReader]:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        with gzip.GzipFile(fileobj=raw) as stream:
            yield io.BufferedReader(stream)
    elif suffix == ".zst":
        import pyarrow

        with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd") as stream:
            yield io.BufferedReader(_Readable(stream))
    else:
        yield raw


class _Readable(io.RawIOBase):
    """A stream of pyarrow with the interface of Python's raw streams."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return int(self._stream.readinto(buffer))


def allow_long_fields() -> None:
    """CSV fields of any length, for the whole process: the limit is Python's, not a reader's."""
    csv.field_size_limit(2**31 - 1)


def encoding_of(stream: io.BufferedReader) -> str:
    """UTF-16 where a file begins with its mark, else UTF-8, with or without one."""
    return "utf-16" if stream.peek(2)[:2] in _UTF16 else "utf-8-sig"
