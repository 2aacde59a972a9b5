"""Rows of JSON: one object a line, or a list of objects, which is decoded piece by piece."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mindspeed_lora.data.readers.opening import encoding_of, opened
from mindspeed_lora.data.readers.rows import BadRow, Row, row_of, shorten
from mindspeed_lora.errors import Refused

_BYTES_LOOKED_AT = 4096
_LONGEST_LINE = 1 << 30
"""A line of more bytes than this is no row."""
_PIECE = 1 << 20
"""Characters of a list that are read at a time, at least."""
_SPACE = " \t\r\n"


def read_json(file: Path) -> Iterator[Row | BadRow]:
    """A list of objects; or, as many data sets have it, one object a line."""
    with opened(file) as (stream, fraction):
        encoding = encoding_of(stream)
        if _begins(stream, encoding, "["):
            yield from _ListReader(file, stream, encoding, fraction).rows()
        else:
            yield from _lines(file, stream, encoding, fraction)


def read_json_lines(file: Path) -> Iterator[Row | BadRow]:
    """One object a line; or, under the wrong name, a list of objects."""
    with opened(file) as (stream, fraction):
        encoding = encoding_of(stream)
        if _begins(stream, encoding, "[{"):
            yield from _ListReader(file, stream, encoding, fraction).rows()
        else:
            yield from _lines(file, stream, encoding, fraction)


def _begins(stream: io.BufferedReader, encoding: str, mark: str) -> bool:
    """Whether that stands at the beginning, perhaps with space before and between."""
    start = stream.peek(_BYTES_LOOKED_AT)
    text = start[: len(start) & ~1].decode(encoding, "replace").lstrip("\ufeff")
    return "".join(text.split()).startswith(mark)


def _lines(
    file: Path, stream: io.BufferedReader, encoding: str, fraction: Callable[[], float]
) -> Iterator[Row | BadRow]:
    for number, line in enumerate(_cut_lines(stream, encoding), 1):
        where = f"{file}, line {number}"
        if line is None:
            yield BadRow(f"{where}: longer than {_LONGEST_LINE:,} bytes", fraction())
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            yield BadRow(
                f"{where}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8", fraction()
            )
            continue
        if not text:
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            problem = error.msg.removesuffix(" at")
            yield BadRow(
                f"{where}: not valid JSON: {problem} at character {error.pos + 1}; expected one object a line or a "
                f"list of objects, found {shorten(text)}",
                fraction(),
            )
        except (RecursionError, ValueError) as error:
            problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            yield BadRow(f"{where}: not usable JSON: {problem}", fraction())
        else:
            yield row_of(where, value, fraction())


def _cut_lines(stream: io.BufferedReader, encoding: str) -> Iterable[bytes | None]:
    """The lines in UTF-8; None in place of one that is too long."""
    if encoding == "utf-16":
        text = io.TextIOWrapper(stream, encoding=encoding, errors="replace", newline="\n")
        yield from (line.encode() for line in text)
        return
    while line := stream.readline(_LONGEST_LINE):
        if len(line) < _LONGEST_LINE or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(_LONGEST_LINE)
        yield None


class _ListReader:
    """Decodes one element after the other; in memory are the element that is decoded and a piece of text behind it."""

    def __init__(
        self, file: Path, stream: io.BufferedReader, encoding: str, fraction: Callable[[], float]
    ) -> None:
        self._file = file
        self._stream = io.TextIOWrapper(stream, encoding=encoding, newline="")
        self._fraction = fraction
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._position = 0
        self._line = 1
        self._at_end = False

    def rows(self) -> Iterator[Row | BadRow]:
        """The elements of the list.

        Raises:
            Refused: the list is broken, so that where its next element begins cannot be told.
        """
        self._next()
        self._position += 1
        number = 0
        while self._next() != "]":
            where = f"{self._file}, row {number + 1}"
            if number > 0:
                if self._next() != ",":
                    raise Refused(f"{where} ({self._place()}): expected , or ] after row {number}")
                self._position += 1
            number += 1
            value = self._value(where)
            yield row_of(where, value, self._fraction())
        self._position += 1
        if self._next():
            raise Refused(f"{self._file} ({self._place()}): there is text behind the list")

    def _place(self, position: int | None = None) -> str:
        lines = self._text.count("\n", 0, self._position if position is None else position)
        return f"line {self._line + lines}"

    def _next(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            while self._position < len(self._text) and self._text[self._position] in _SPACE:
                self._position += 1
            if self._position < len(self._text) or not self._more():
                return self._text[self._position : self._position + 1]

    def _more(self) -> bool:
        """Read more text, and forget what is done with."""
        if self._at_end:
            return False
        self._line += self._text.count("\n", 0, self._position)
        kept = self._text[self._position :]
        try:
            # An element of any length is decoded a few times only.
            read = self._stream.read(max(_PIECE, len(kept)))
        except UnicodeDecodeError as error:
            raise Refused(
                f"{self._file}, behind {self._place(0)}: not UTF-8 text; save the file as UTF-8"
            ) from error
        self._at_end = not read
        self._text, self._position = kept + read, 0
        return bool(read)

    def _value(self, where: str) -> object:
        self._next()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                # Near the end of what was read, and in a text, the reason may be that there is more.
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16
                if cut and self._more():
                    continue
                raise Refused(f"{where} ({self._place(error.pos)}): not valid JSON: {error.msg}") from error
            except (RecursionError, ValueError) as error:
                problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                raise Refused(f"{where} ({self._place()}): not usable JSON: {problem}") from error
            if end == len(self._text) and self._more():
                continue
            self._position = end
            return value
