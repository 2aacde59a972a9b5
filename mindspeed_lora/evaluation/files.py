"""Files of questions. What is missing in one is refused by the name of the file and the place in it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindspeed_lora.data.readers.opening import PACKED, allow_long_fields, encoding_of, opened
from mindspeed_lora.errors import Refused

Row = dict[str, Any]

_TEXTS = (
    *("activity_label", "ctx_a", "ctx_b", "entry_point", "input", "needle"),
    *("passage", "prompt", "question", "retrieval_question", "test", "text"),
)
_LISTS_OF_TEXTS = ("derivations", "endings", "options")


def files_in(path: Path, pattern: str, flag: str = "--task-data-path") -> list[Path]:
    """The files of a folder that match a pattern, sorted by name; a file stands for itself.

    Packed JSON files (``a.jsonl.gz``) are among them, unless they lie beside what was unpacked from them. Hidden files
    are not: a Mac's archives hold one (``._name``) beside each file.

    Raises:
        Refused: there are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise Refused(f"{flag} {path}: is not there; name the folder of the benchmark's files")
    suffixes = ("", *PACKED) if ".json" in pattern else ("",)
    matching = [file for suffix in suffixes for file in path.glob(pattern + suffix) if file.is_file()]
    found = [file for file in matching if not file.name.startswith(".")]
    if not found:
        raise Refused(f"{flag} {path}: holds no file {pattern}; name the folder of the benchmark's files")
    return sorted(file for file in found if file.suffix not in PACKED or file.with_suffix("") not in found)


def subject_of(file: Path) -> str:
    """The name of a file without its suffixes, ``a.b`` of ``a.b.jsonl.gz``."""
    return Path(file.stem).stem if file.suffix in PACKED else file.stem


def read_text(path: Path) -> str:
    """A file as text, unpacked; a byte-order mark is left out."""
    try:
        with opened(path) as (stream, _):
            encoding = encoding_of(stream)
            return stream.read().decode(encoding)
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error


def read_csv(path: Path, columns: Sequence[str], header: bool) -> list[tuple[int, Row]]:
    """The rows of a CSV file with at least these columns, and their numbers in it, from 1.

    Args:
        path: the file.
        columns: names that the header must have; without a header the names of all columns, in order.
        header: the first row holds the names.
    """
    rows = _csv_rows(path)
    if not rows:
        raise Refused(f"{path}: holds no row; expected the columns {', '.join(columns)}")
    names = [name.strip() for name in rows[0][1]] if header else list(columns)
    missing = [name for name in columns if name not in names]
    if missing:
        raise Refused(f"{path}: there is no column {', '.join(missing)}; its columns are {', '.join(names)}")
    twice = [name for name in columns if names.count(name) > 1]
    if twice:
        raise Refused(f"{path}: there are two columns {', '.join(twice)}; leave one of them")
    found = []
    for number, row in rows[1:] if header else rows:
        if len(row) != len(names):
            raise Refused(
                f"{path}, row {number}: has {len(row)} columns; expected {len(names)}: {', '.join(names)}"
            )
        found.append((number, dict(zip(names, row, strict=True))))
    if not found:
        raise Refused(f"{path}: holds no question")
    return found


def _csv_rows(path: Path) -> list[tuple[int, list[str]]]:
    """All rows that are not blank, with their numbers from 1."""
    allow_long_fields()
    # Only line ends end a row: a text may hold the other characters that str.splitlines() splits at.
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    return [(number, row) for number, row in enumerate(reader, 1) if len(row) > 1 or any(map(str.strip, row))]


def read_jsonl(path: Path, keys: Sequence[str], optional: Sequence[str] = ()) -> list[Row]:
    """The objects of a JSONL file, each with at least these keys, and maybe optional ones, which may be null."""
    rows = []
    # Only line feeds end a line: a text may hold the other characters that str.splitlines() splits at.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Refused(f"{path}, row {number}: not JSON ({error})") from error
        rows.append(_with_keys(row, keys, f"{path}, row {number}", optional))
    if not rows:
        raise Refused(f"{path}: holds no row; expected JSONL with the keys {', '.join(keys)}")
    return rows


def read_examples(path: Path, keys: Sequence[str]) -> list[Row]:
    """The ``examples`` of a JSON file, each with at least these keys."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path}: not JSON ({error})") from error
    examples = content.get("examples") if isinstance(content, dict) else None
    if not isinstance(examples, list) or not examples:
        raise Refused(f"{path}: expected an object with a list examples that holds questions")
    return [_with_keys(row, keys, f"{path}, example {number}") for number, row in enumerate(examples)]


def read_list(path: Path, keys: Sequence[str]) -> list[Row]:
    """The objects of a JSON file that is a list, each with at least these keys."""
    try:
        rows = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path}: not JSON ({error})") from error
    if not isinstance(rows, list) or not rows:
        raise Refused(f"{path}: expected a list of objects with the keys {', '.join(keys)}")
    return [_with_keys(row, keys, f"{path}, question {number}") for number, row in enumerate(rows)]


def _with_keys(row: Any, keys: Sequence[str], place: str, optional: Sequence[str] = ()) -> Row:
    """The row, if it has the keys and texts where texts are expected; what no tokenizer takes is replaced in them."""
    if not isinstance(row, dict):
        raise Refused(f"{place}: expected an object with the keys {', '.join(keys)}")
    missing = [key for key in keys if key not in row]
    if missing:
        raise Refused(f"{place}: there is no key {', '.join(missing)}; its keys are {', '.join(row)}")
    for key in (*keys, *(key for key in optional if row.get(key) is not None)):
        if key in _TEXTS and not isinstance(row[key], str):
            raise Refused(f"{place}: {key} is {_short(row[key])}; expected a text")
    for key in _LISTS_OF_TEXTS:
        value = row.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            raise Refused(f"{place}: {key} is {_short(value)}; expected a list of texts")
    return {key: _writable(value) for key, value in row.items()}


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]


def _writable(value: Any) -> Any:
    """Texts without lone surrogates, which JSON escapes can spell and UTF-8 cannot."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return [_writable(one) for one in value] if isinstance(value, list) else value
