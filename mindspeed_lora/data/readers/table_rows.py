"""Rows of Parquet, Arrow, CSV and text files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mindspeed_lora.data.readers.opening import allow_long_fields, encoding_of, opened
from mindspeed_lora.data.readers.rows import BadRow, Row, shorten
from mindspeed_lora.errors import Refused


def read_parquet(file: Path) -> Iterator[Row | BadRow]:
    """One row group after the other."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            yield from _rows_of_batches(file, table.iter_batches(batch_size=1024), table.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise Refused(f"{file}: not a readable Parquet file ({str(error).splitlines()[0]})") from error


def read_arrow(file: Path) -> Iterator[Row | BadRow]:
    """An Arrow file, or a stream, which ``datasets`` writes."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(file)) as source:
            number = 0
            for batch, fraction in _arrow_batches(source):
                for start in range(0, batch.num_rows, 1024):
                    for values in batch.slice(start, 1024).to_pylist():
                        number += 1
                        yield Row(f"{file}, row {number}", values, fraction)
    except (pyarrow.ArrowException, OSError) as error:
        raise Refused(f"{file}: not a readable Arrow file ({str(error).splitlines()[0]})") from error


def _arrow_batches(source: Any) -> Iterator[tuple[Any, float]]:
    """The batches of a file or a stream, each with how much of it has been read with it."""
    import pyarrow

    try:
        table = pyarrow.ipc.open_file(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        for batch in pyarrow.ipc.open_stream(source):
            yield batch, source.tell() / max(source.size(), 1)
        return
    for number in range(table.num_record_batches):
        yield table.get_batch(number), (number + 1) / table.num_record_batches


def _rows_of_batches(file: Path, batches: Iterable[Any], total: int) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield Row(f"{file}, row {number}", values, number / total)


def read_csv(file: Path) -> Iterator[Row | BadRow]:
    """The first line names the columns."""
    allow_long_fields()
    with opened(file) as (stream, fraction):
        text = io.TextIOWrapper(stream, encoding=encoding_of(stream), newline="")
        reader = csv.reader(text, strict=True)
        try:
            given = next(reader, [])
            # An index that was written along has no name; pandas gives it this one.
            names = [name or f"Unnamed: {number}" for number, name in enumerate(given)]
            if len(set(names)) != len(names) or not any(given):
                raise Refused(f"{file}, line 1: expected column names, found {shorten(','.join(given))}")
            for number, fields in enumerate(reader, 1):
                where = f"{file}, row {number} (line {reader.line_num})"
                if not fields:
                    continue
                if len(fields) != len(names):
                    yield BadRow(
                        f"{where}: {len(fields)} fields, but the header has {len(names)}", fraction()
                    )
                else:
                    yield Row(where, dict(zip(names, fields, strict=True)), fraction())
        except csv.Error as error:
            raise Refused(f"{file}, line {reader.line_num}: not valid CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise Refused(
                f"{file}, behind line {reader.line_num}: not UTF-8 text; save it as UTF-8"
            ) from error


def read_text(file: Path) -> Iterator[Row | BadRow]:
    """Each line that is not empty is a row with the column ``text``."""
    with opened(file) as (stream, fraction):
        lines: Iterable[bytes] = stream
        if encoding_of(stream) == "utf-16":
            wide = io.TextIOWrapper(stream, encoding="utf-16", errors="replace", newline="\n")
            lines = (line.encode() for line in wide)
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield BadRow(f"{where}: not UTF-8 text (byte {error.start + 1})", fraction())
                continue
            if text.strip():
                yield Row(where, {"text": text}, fraction())
