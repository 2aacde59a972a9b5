"""Rows of JSON, JSONL, Parquet, Arrow, CSV and text files, one at a time, each with the place where it stands.

Files are read piece by piece, whatever their size.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from mindspeed_lora.data.readers.json_rows import read_json, read_json_lines
from mindspeed_lora.data.readers.opening import PACKED, kind_of
from mindspeed_lora.data.readers.rows import BadRow, Row, describe
from mindspeed_lora.data.readers.table_rows import read_arrow, read_csv, read_parquet, read_text
from mindspeed_lora.errors import Refused

__all__ = ["BadRow", "Row", "describe", "input_files", "read_rows"]

_READERS: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".arrow": read_arrow,
    ".txt": read_text,
}
_NO_ROWS = (
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"),
    *("*_packed_info.json", "*_document_info.json"),
)
"""Files beside rows that describe them: of ``datasets``, of LLaMA-Factory, and of sets prepared here."""
_PACKABLE = (".json", ".jsonl", ".csv", ".txt")


def input_files(
    path: str | Path, notice: Callable[[str], None] = lambda text: None, flag: str = "--input"
) -> list[Path]:
    """The file that ``path`` names, or a folder's files of the kind that is most frequent there, by name."""
    given = Path(path)
    if given.is_file():
        if not _is_known(given):
            if given.suffix == ".py":
                raise Refused(
                    f"{flag} {path}: a script, and code of data sets is not run; give the rows themselves"
                )
            raise Refused(
                f"{flag} {path}: unknown kind of file; expected {', '.join(_READERS)} "
                f"({', '.join(_PACKABLE)} also packed, {' or '.join(PACKED)})"
            )
        return [given]
    if not given.is_dir():
        raise Refused(f"{flag} {path}: no such file or folder")
    in_parts = (given / "dataset_dict.json").is_file() and (given / "train").is_dir()
    saved = _saved_by_datasets(given / "train" if in_parts else given)
    if saved:
        return saved
    known = _files_of_rows(given)
    if not known and (given / "data").is_dir():
        known = _training_part(_files_of_rows(given / "data"))
    if not known:
        folders = sorted(inner.name for inner in given.iterdir() if inner.is_dir())
        inside = f"; folders inside ({', '.join(folders)}) are not looked into, name them" if folders else ""
        raise Refused(f"{flag} {path}: the folder has no {', '.join(_READERS)} file{inside}")
    kind, _ = Counter(map(kind_of, known)).most_common(1)[0]
    others = [file.name for file in known if kind_of(file) != kind]
    if others:
        notice(f"{flag} {path}: the {kind} files are read; left out: {', '.join(others)}")
    return [file for file in known if kind_of(file) == kind]


def _files_of_rows(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and _is_known(file)
        and not file.name.startswith(".")
        and not any(file.match(pattern) for pattern in _NO_ROWS)
    ]


def _training_part(files: list[Path]) -> list[Path]:
    """Data sets of a hub lie in a folder ``data``, with the part that a file is of before its number."""
    return [file for file in files if re.match(r"train\b", file.name)] or files


def _is_known(file: Path) -> bool:
    kind = kind_of(file)
    return kind in (_PACKABLE if file.suffix.lower() in PACKED else _READERS)


def _saved_by_datasets(folder: Path) -> list[Path]:
    """The files of a data set that ``datasets`` saved (``save_to_disk``), in its order; none in other folders."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return files if all(file.is_file() and file.parent == folder for file in files) else []


def read_rows(file: Path) -> Iterator[Row | BadRow]:
    """The rows of one file, and the broken ones in their places.

    Raises:
        Refused: the file is empty, or malformed so that what follows cannot be read; the message names file, place
            and what was found.
    """
    try:
        if file.stat().st_size == 0:
            raise Refused(f"{file}: the file is empty")
        found = False
        for row in _READERS[kind_of(file)](file):
            found = True
            yield row
    except (FileNotFoundError, PermissionError) as error:
        raise Refused(f"{file}: cannot be read ({error.strerror})") from error
    if not found:
        raise Refused(f"{file}: the file has no rows")
