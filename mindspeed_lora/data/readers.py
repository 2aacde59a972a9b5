"""Rows of JSON, JSONL, Parquet and CSV files, one at a time, each with the place where it stands."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_lora.errors import Refused

_BYTES_LOOKED_AT = 4096


@dataclass(frozen=True)
class Row:
    """One row of a file."""

    where: str
    """File and number of the row, for messages."""
    values: dict[str, Any]
    fraction: float
    """How much of its file has been read with this row."""


def input_files(path: str | Path, notice: Callable[[str], None] = lambda text: None) -> list[Path]:
    """The file that ``path`` names, or a folder's files of the kind that is most frequent there, by name."""
    given = Path(path)
    if given.is_file():
        if given.suffix.lower() not in _READERS:
            raise Refused(f"--input {path}: unknown kind of file; expected {', '.join(_READERS)}")
        return [given]
    if not given.is_dir():
        raise Refused(f"--input {path}: no such file or folder")
    known = [
        file
        for file in sorted(given.iterdir())
        if file.is_file() and file.suffix.lower() in _READERS and not file.name.startswith(".")
    ]
    if not known:
        raise Refused(f"--input {path}: the folder has no {', '.join(_READERS)} file")
    kind, _ = Counter(file.suffix.lower() for file in known).most_common(1)[0]
    others = [file.name for file in known if file.suffix.lower() != kind]
    if others:
        notice(f"--input {path}: the {kind} files are read; left out: {', '.join(others)}")
    return [file for file in known if file.suffix.lower() == kind]


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of one file.

    Raises:
        Refused: the file is empty or malformed; the message names file, place and what was found.
    """
    try:
        if file.stat().st_size == 0:
            raise Refused(f"{file}: the file is empty")
        found = False
        for row in _READERS[file.suffix.lower()](file):
            found = True
            yield row
    except (FileNotFoundError, PermissionError) as error:
        raise Refused(f"{file}: cannot be read ({error.strerror})") from error
    if not found:
        raise Refused(f"{file}: the file has no rows")


def _read_json(file: Path) -> Iterator[Row]:
    """A list of objects; or, as many data sets have it, one object a line."""
    with open(file, "rb") as stream:
        start = stream.read(_BYTES_LOOKED_AT).removeprefix(b"\xef\xbb\xbf").lstrip()
    return _read_json_list(file) if start[:1] == b"[" else _read_json_lines(file)


def _read_json_list(file: Path) -> Iterator[Row]:
    """Decodes one element after the other, so that only the text is in memory as a whole."""
    text = _decode(file.read_bytes(), str(file))
    decoder = json.JSONDecoder()
    position = _skip_space(text, text.index("[") + 1)
    number = 0
    while text[position : position + 1] != "]":
        where = f"{file}, row {number + 1}"
        if number > 0:
            if text[position : position + 1] != ",":
                raise Refused(f"{where} ({_line(text, position)}): expected , or ] after row {number}")
            position = _skip_space(text, position + 1)
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise Refused(f"{where} ({_line(text, error.pos)}): not valid JSON: {error.msg}") from error
        position = _skip_space(text, position)
        number += 1
        yield _row(where, value, position / len(text))
    if _skip_space(text, position + 1) < len(text):
        raise Refused(f"{file} ({_line(text, position + 1)}): there is text behind the list")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _line(text: str, position: int) -> str:
    return f"line {text.count(chr(10), 0, position) + 1}"


def _read_json_lines(file: Path) -> Iterator[Row]:
    size = file.stat().st_size
    done = 0
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            done += len(line)
            where = f"{file}, line {number}"
            text = _decode(line, where).strip()
            if not text:
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise Refused(
                    f"{where}: not valid JSON: {error.msg} at character {error.pos + 1}; expected one object a "
                    f"line or a list of objects, found {_shorten(text)}"
                ) from error
            yield _row(where, value, done / size)


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"{where}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8") from error


def _row(where: str, value: Any, fraction: float) -> Row:
    if not isinstance(value, dict):
        raise Refused(f"{where}: expected an object, found {describe(value)}")
    return Row(where, value, fraction)


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            total = table.metadata.num_rows
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{file}, row {number}", values, number / total)
    except pyarrow.ArrowException as error:
        raise Refused(f"{file}: not a readable Parquet file ({str(error).splitlines()[0]})") from error


def _read_csv(file: Path) -> Iterator[Row]:
    size = file.stat().st_size
    csv.field_size_limit(2**31 - 1)
    with open(file, "rb") as binary:
        reader = csv.reader(io.TextIOWrapper(binary, encoding="utf-8-sig", newline=""), strict=True)
        try:
            names = next(reader)
            if len(set(names)) != len(names) or not all(names):
                raise Refused(f"{file}, line 1: expected column names, found {_shorten(','.join(names))}")
            for number, fields in enumerate(reader, 1):
                where = f"{file}, row {number} (line {reader.line_num})"
                if not fields:
                    continue
                if len(fields) != len(names):
                    raise Refused(f"{where}: {len(fields)} fields, but the header has {len(names)}")
                yield Row(where, dict(zip(names, fields, strict=True)), binary.tell() / size)
        except csv.Error as error:
            raise Refused(f"{file}, line {reader.line_num}: not valid CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise Refused(
                f"{file}, behind line {reader.line_num}: not UTF-8 text; save it as UTF-8"
            ) from error


def describe(value: Any) -> str:
    """What a value of a row is, for messages: its kind and its beginning."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = {dict: "an object", list: "a list", str: "text", int: "the number", float: "the number"}
    kind = kinds.get(type(value), f"a {type(value).__name__}")
    return f"{kind} {_shorten(json.dumps(value, ensure_ascii=False, default=str))}"


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
