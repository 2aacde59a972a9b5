"""The parts of an uncompressed zip archive as bytes: local headers, central directory and its end.

ZIP64 throughout (APPNOTE.TXT 6.3.10, 4.3.7, 4.3.12, 4.3.14 to 4.3.16, 4.5.3), so that every part has the same length
whatever the sizes are, and each record's place is known before its content.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

_VERSION = 45
_DATE = 1 << 5 | 1  # 1980-01-01: the same input gives the same file.
_FULL = 0xFFFFFFFF
_UTF8 = 1 << 11
_LOCAL_HEADER = 30
_ZIP64_EXTRA = 20
_PADDING_HEADER = 4


@dataclass(frozen=True)
class Record:
    """One stored record."""

    name: str
    offset: int
    """Position of its local header."""
    size: int
    """Bytes of its content."""
    padding: int
    """Bytes of padding in its local header, which align the content."""

    @classmethod
    def at(cls, name: str, offset: int, size: int, alignment: int) -> Record:
        """A record whose header is at ``offset`` and whose content starts at a multiple of ``alignment``."""
        start = offset + _LOCAL_HEADER + len(name.encode()) + _ZIP64_EXTRA + _PADDING_HEADER
        return cls(name, offset, size, -start % alignment)

    @property
    def start(self) -> int:
        """Position of the content."""
        header = _LOCAL_HEADER + len(self.name.encode()) + _ZIP64_EXTRA + _PADDING_HEADER
        return self.offset + header + self.padding

    @property
    def stop(self) -> int:
        """Position after the content, where the next record begins."""
        return self.start + self.size

    def header(self, crc: int) -> bytes:
        """The local header, up to the content."""
        name = self.name.encode()
        extra = struct.pack("<HHQQ", 1, 16, self.size, self.size)
        extra += struct.pack("<2sH", b"FB", self.padding) + b"Z" * self.padding
        fixed = struct.pack(
            "<4sHHHHHIIIHH",
            b"PK\x03\x04",
            _VERSION,
            _UTF8,
            0,
            0,
            _DATE,
            crc,
            _FULL,
            _FULL,
            len(name),
            len(extra),
        )
        return fixed + name + extra

    def entry(self, crc: int) -> bytes:
        """The record's entry of the central directory."""
        name = self.name.encode()
        extra = struct.pack("<HHQQQ", 1, 24, self.size, self.size, self.offset)
        fixed = struct.pack(
            "<4sHHHHHHIIIHHHHHII",
            b"PK\x01\x02",
            _VERSION,
            _VERSION,
            _UTF8,
            0,
            0,
            _DATE,
            crc,
            _FULL,
            _FULL,
            len(name),
            len(extra),
            0,
            0,
            0,
            0,
            _FULL,
        )
        return fixed + name + extra


def directory(records: Sequence[tuple[Record, int]], offset: int) -> bytes:
    """The central directory of the records, each with its checksum, and its end; it starts at ``offset``."""
    entries = b"".join(record.entry(crc) for record, crc in records)
    count, size = len(records), len(entries)
    end64 = struct.pack(
        "<4sQHHIIQQQQ", b"PK\x06\x06", 44, _VERSION, _VERSION, 0, 0, count, count, size, offset
    )
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, offset + size, 1)
    short = min(count, 0xFFFF)
    end = struct.pack(
        "<4sHHHHIIH", b"PK\x05\x06", 0, 0, short, short, min(size, _FULL), min(offset, _FULL), 0
    )
    return entries + end64 + locator + end
