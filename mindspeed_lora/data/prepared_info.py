"""``{prefix}_packed_info.json``: how prepared data were made, so that training can see whether they fit.

Data prepared by other systems have no such file; then nothing is checked.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mindspeed_lora.errors import Refused

if TYPE_CHECKING:
    from mindspeed_lora.data.tokenizer import LazyTokenizer

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class PreparedInfo:
    """What the trainer needs to know about prepared data besides the tokens."""

    tokenizer_fingerprint: str
    tokenizer_files: str | None = None
    """The hash of the tokenizer's files, which is the quicker to compare; None: not known."""
    handler_name: str
    prompt_type: str | None = None
    chat_template: str | None = None
    """Jinja text that renders the same tokens as the data have; None for plain text."""
    seq_length: int | None = None
    overlong: str = "truncate"
    loss_on: str = "assistant"
    append_eod: bool = False
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    pack: str | None = None
    """How several rows were put into one document: ``plain``, ``neat``, or None, one row a document."""
    num_documents: int = 0
    num_rows: int | None = None
    """Rows in the documents, where they are packed."""
    num_tokens: int = 0
    num_loss_tokens: int = 0
    weighted: bool = False
    """Whether tokens have weights in the loss, in a file of their own."""
    longest: int = 0
    source: str | None = None
    """What a training made it from: a hash of rows, tokenizer, template and flags."""
    files: Mapping[str, int] = field(default_factory=dict)
    """Name and size in bytes of each file of the set."""
    format: int = FORMAT


def info_path(prefix: str | Path) -> Path:
    """Where the information on instruction data with ``--data-path prefix`` lies."""
    return Path(f"{prefix}_packed_info.json")


def text_info_path(prefix: str | Path) -> Path:
    """Where the information on plain-text data with ``--data-path prefix`` lies."""
    return Path(f"{prefix}_info.json")


def read_info(prefix: str | Path) -> PreparedInfo | None:
    """The information beside the data of ``prefix``, or None where there is none.

    Refuses a set whose files are not those that the information was written for.
    """
    for path in (info_path(prefix), text_info_path(prefix)):
        if path.is_file():
            return _read(path)
    return None


def _read(path: Path) -> PreparedInfo:
    known = {item.name for item in dataclasses.fields(PreparedInfo)}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        info = PreparedInfo(**{key: value for key, value in content.items() if key in known})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(
            f"{path}: not readable as data information ({error}); prepare the data again"
        ) from error
    for name, size in info.files.items():
        found = path.with_name(name)
        if not found.is_file():
            raise Refused(f"{found}: missing, though {path.name} lists it; prepare the data again")
        if found.stat().st_size != size:
            raise Refused(
                f"{found}: {found.stat().st_size} bytes, but {path.name} was written for {size}; "
                "the files are of different runs, prepare the data again"
            )
    return info


def to_json(info: PreparedInfo) -> str:
    """The text of the information file."""
    return json.dumps(dataclasses.asdict(info), indent=2, ensure_ascii=False) + "\n"


def check_tokenizer(info: PreparedInfo | None, tokenizer: LazyTokenizer, prefix: str | Path) -> None:
    """Refuse a tokenizer that is not the one that the data were prepared with."""
    from mindspeed_lora.data.tokenizer import tokenizer_fingerprint

    if info is None or (info.tokenizer_files is not None and info.tokenizer_files == tokenizer.files_digest):
        return
    fingerprint = tokenizer_fingerprint(tokenizer.loaded)
    if fingerprint != info.tokenizer_fingerprint:
        raise Refused(
            f"the data of --data-path {prefix} were prepared with another tokenizer (fingerprint "
            f"{info.tokenizer_fingerprint[:12]}) than {tokenizer.loaded.name_or_path} "
            f"(fingerprint {fingerprint[:12]}); give the tokenizer of the data by "
            "--tokenizer-name-or-path or prepare the data again"
        )
