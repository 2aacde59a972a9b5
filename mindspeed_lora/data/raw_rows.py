"""Files of raw rows given to a training: prepared once, and found again by what they were made of.

The first process of a node prepares, the others wait for it: a lock of the file system says who does, and is free
again when its owner dies. Prepared files appear whole, the information on them last, so that a set is either complete
or not there; what a killed process left is gone on with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TextIO

from mindspeed_lora import __version__
from mindspeed_lora.config.jobs import PreprocessJob
from mindspeed_lora.data.added_tokens import job_tokenizer
from mindspeed_lora.data.atomic_output import output_folder
from mindspeed_lora.data.indexed_dataset import idx_path
from mindspeed_lora.data.prepared_info import PreparedInfo, info_path, read_info, text_info_path
from mindspeed_lora.data.preprocess import SAME_BYTES, preprocess
from mindspeed_lora.data.readers import input_files
from mindspeed_lora.data.sft_dataset import packed_prefix
from mindspeed_lora.data.tokenizer import tokenizer_fingerprint, tokenizer_folder
from mindspeed_lora.errors import Refused

CACHE_FOLDER = ".prepared"
_SECONDS_FOR_THE_FIRST = 10.0
"""So long the other processes of a node leave it to the first one to begin."""
_SECONDS_BETWEEN_LOOKS = 0.2
_PATHS = ("tokenizer_name_or_path", "tokenizer_model", "add_tokens", "prompt_type_path")
"""Settings of the tokenizer that count by the content of what they name."""


def holds_raw_rows(path: str) -> bool:
    """Whether a word of ``--data-path`` names a file or folder of rows that are not prepared yet."""
    return not is_prepared(path) and Path(path).exists()


def is_prepared(path: str) -> bool:
    """Whether a word of ``--data-path`` names prepared data."""
    return any(idx_path(prefix).exists() for prefix in (path, packed_prefix(path, "input_ids")))


@dataclass(frozen=True)
class RawRows:
    """One file or folder of rows, and how it is prepared."""

    job: PreprocessJob
    """Its ``--input`` are the rows; an ``--output-prefix`` is where the user wants them prepared."""
    cache: str | None = None
    """Where they are prepared else, in place of the folder beside the rows."""

    def prepared(self, environ: Mapping[str, str] = os.environ) -> str:
        """The prefix of the prepared data, which is made where it is not there yet.

        Raises:
            Refused: the rows cannot be prepared, or another set lies in their place.
        """
        source = source_key(self.job)
        prefix = self._prefix(source)
        if _is_complete(prefix, source):
            return prefix
        lock = _lock_path(prefix)
        with output_folder(lock.parent):
            if not _is_first_of_node(environ):
                _leave_it_to_the_first(prefix, source)
            with _locked(lock):
                if not _is_complete(prefix, source):
                    self._refuse_strange_files(prefix)
                    _prepare(self.job, prefix, source)
        return prefix

    def _prefix(self, source: str) -> str:
        if self.job.preprocess.output_prefix is not None:
            return self.job.preprocess.output_prefix
        rows = Path(self.job.preprocess.input or "").resolve()
        folder = Path(self.cache) if self.cache is not None else rows.parent / CACHE_FOLDER
        if self.cache is None and not _can_be_made(folder):
            home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
            folder = Path(home) / "mindspeed_lora" / "prepared"
        return str(folder / f"{rows.name}-{source[:16]}" / "rows")

    def _refuse_strange_files(self, prefix: str) -> None:
        """What a training prepared may be replaced, what anybody else did may not."""
        info = _info(prefix)
        strange = info.source is None if info is not None else _any_set(prefix)
        if strange:
            raise Refused(
                f"--output-prefix {prefix}: prepared data that were not made from these rows by a training lie there; "
                "give them as --data-path, or name another prefix"
            )


def training_prefix(prefix: str, stage: str) -> str:
    """What training reads of the data prepared at ``prefix``.

    Raises:
        Refused: they are of the other kind.
    """
    is_text = not info_path(prefix).exists()
    if is_text != (stage == "pretrain"):
        kind, script = (
            ("plain text", "pretrain_gpt.py") if is_text else ("instruction rows", "posttrain_gpt.py")
        )
        raise Refused(f"the rows prepared at {prefix} are {kind}, which {script} trains on")
    if not is_text and idx_path(packed_prefix(prefix, "chosen_input_ids")).exists():
        raise Refused(
            f"the rows prepared at {prefix} are pairs of a chosen and a rejected answer, on which nothing here trains; "
            "give conversations"
        )
    if not is_text:
        return prefix
    found = sorted(Path(prefix).parent.glob(f"{Path(prefix).name}_*_document.idx"))
    if len(found) != 1:
        raise Refused(
            f"--json-keys: training reads one column of plain text, and {len(found)} were prepared; name one"
        )
    return str(found[0]).removesuffix(".idx")


def source_key(job: PreprocessJob) -> str:
    """A hash of all that the prepared bytes depend on: rows, tokenizer, template, flags and this version."""
    settings = {
        k: v for k, v in dataclasses.asdict(job.preprocess).items() if k not in (*SAME_BYTES, "input")
    }
    tokenizer = {k: v for k, v in dataclasses.asdict(job.tokenizer).items() if k not in _PATHS}
    folder = job.tokenizer.tokenizer_name_or_path or job.tokenizer.tokenizer_model or ""
    lazy = job_tokenizer(job.tokenizer, folder)
    named = getattr(job.tokenizer, "prompt_type_path", None)
    content = {
        "version": __version__,
        "rows": [(path.name, _digest(path)) for path in input_files(job.preprocess.input or "")],
        "settings": settings,
        "tokenizer": [tokenizer, lazy.files_digest or tokenizer_fingerprint(lazy.loaded)],
        "chat_template": _digest(tokenizer_folder(folder) / "chat_template.jinja"),
        "templates": [
            hashlib.sha256(resources.files("mindspeed_lora.data").joinpath(name).read_bytes()).hexdigest()
            for name in ("templates.json", "tool_formats.json")
        ],
        "own_templates": None if named is None else _digest(Path(named)),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _prepare(job: PreprocessJob, prefix: str, source: str) -> None:
    config = dataclasses.replace(job.preprocess, output_prefix=prefix)
    print(f"notice: preparing {config.input} as {prefix}", file=sys.stderr, flush=True)
    preprocess(dataclasses.replace(job, preprocess=config, notices=()), source)


def _is_complete(prefix: str, source: str) -> bool:
    info = _info(prefix)
    return info is not None and info.source == source


def _info(prefix: str) -> PreparedInfo | None:
    """What is told of the data at a prefix; None where they are not there, or not whole."""
    candidates = [prefix]
    if not info_path(prefix).exists():
        infos = Path(prefix).parent.glob(f"{Path(prefix).name}_*_document_info.json")
        candidates = [str(path).removesuffix("_info.json") for path in sorted(infos)]
    found: list[PreparedInfo | None] = []
    for candidate in candidates:
        with contextlib.suppress(Refused):
            found.append(read_info(candidate))
    return found[0] if found else None


def _any_set(prefix: str) -> bool:
    """Whether any indexed data set lies at a prefix that tells nothing of how it was made."""
    files = Path(prefix).parent.glob(f"{Path(prefix).name}_*document.idx")
    return (
        any(not text_info_path(str(file).removesuffix(".idx")).exists() for file in files)
        and not info_path(prefix).exists()
    )


def _is_first_of_node(environ: Mapping[str, str]) -> bool:
    return environ.get("LOCAL_RANK", environ.get("RANK", "0")) == "0"


def _leave_it_to_the_first(prefix: str, source: str, clock: Callable[[], float] = time.monotonic) -> None:
    """Wait until the set is there, until somebody is at it, or for some seconds."""
    deadline = clock() + _SECONDS_FOR_THE_FIRST
    while clock() < deadline and not (_is_complete(prefix, source) or _is_locked(_lock_path(prefix))):
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _can_be_made(folder: Path) -> bool:
    """Whether files can be made in a folder, which may not be there yet."""
    existing = folder if folder.is_dir() else folder.parent
    return os.access(existing, os.W_OK | os.X_OK)


def _lock_path(prefix: str) -> Path:
    return Path(prefix).with_name(f".{Path(prefix).name}.lock")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone in here, as far as the file system can tell; a dead owner's lock is free, one who is refused removes it."""
    with _opened(path) as stream:
        # File systems without locks: then several may prepare the same bytes, each beside the target.
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        except Refused:
            path.unlink(missing_ok=True)
            raise


def _opened(path: Path) -> TextIO:
    """The file of a lock, in whose folder another process may just have left nothing."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return path.open("a")


def _is_locked(path: Path) -> bool:
    try:
        with path.open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
