"""Hub ids where a flag takes a path: ``org/name`` or ``org/name@revision`` becomes the folder of its snapshot.

A path is what lies on the disk, what cannot be an id, and what stands below a folder that is there; so a mistyped
path is hardly ever asked for on a hub, and is refused there by name if it is. ``hf://`` and ``modelscope://`` before
an id say which hub is meant; without them it is Hugging Face, or ModelScope where ``USE_MODELSCOPE_HUB`` is 1.

One rank of a node downloads: the others wait for its lock, and take what it noted there.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mindspeed_lora.errors import Refused

_STARTED = time.time()

_ID = re.compile(
    r"(?P<hub>hf://|modelscope://)?(?P<name>[\w][\w.\-]*/[\w][\w.\-]*)(?:@(?P<revision>[\w.\-/]+))?", re.ASCII
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE_ENDINGS = (
    *(".json", ".jsonl", ".parquet", ".csv", ".txt", ".yaml", ".yml", ".toml", ".model", ".jinja", ".zip"),
    *(".bin", ".idx", ".pt", ".pth", ".safetensors", ".gguf", ".npy", ".tar", ".gz"),
)

_TEXT = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_WEIGHTS = ("*.safetensors", "*.bin", "latest_checkpointed_iteration.txt", "*.pt", "*.distcp", ".metadata")
_PATTERNS: Mapping[str, tuple[str, ...]] = {
    "model": (*_TEXT, *_WEIGHTS),
    "adapter": (*_TEXT, "*.safetensors"),
    "tokenizer": _TEXT,
    "dataset": ("*.json", "*.jsonl", "*.parquet", "*.csv"),
}
"""What is downloaded; programs only with ``--trust-remote-code``."""

_FIELDS = (
    ("checkpoint", "load", "--load", "model"),
    ("conversion", "load_dir", "--load-dir", "model"),
    ("lora", "lora_load", "--lora-load", "adapter"),
    ("conversion", "lora_load", "--lora-load", "adapter"),
    ("tokenizer", "tokenizer_name_or_path", "--tokenizer-name-or-path", "tokenizer"),
    ("preprocess", "input", "--input", "dataset"),
    ("preprocess", "datasets", "--datasets", "dataset"),
)
"""Section and field of a job, its flag, and what lies there."""


@dataclass(frozen=True)
class HubId:
    """A name on a hub."""

    name: str
    revision: str | None
    """Branch, tag or commit; None: the hub's default."""
    hub: str
    """``huggingface`` or ``modelscope``."""

    def __str__(self) -> str:
        return self.name + (f"@{self.revision}" if self.revision else "")

    def of_commit(self, snapshot: Path) -> str:
        """The id as a flag takes it on any machine, with the commit that the cache names its folder by."""
        commit = snapshot.name if _COMMIT.fullmatch(snapshot.name) else self.revision
        hub = "modelscope://" if self.hub == "modelscope" else "hf://"
        return hub + str(dataclasses.replace(self, revision=commit))


def hub_id(text: str, environ: Mapping[str, str] = os.environ) -> HubId | None:
    """The id that a flag's value is; None where it is a path."""
    match = _ID.fullmatch(text)
    if match is None:
        return None
    given = match["hub"]
    if not given:
        below = Path(text).parts[0]
        if Path(text).exists() or Path(below).exists() or match["name"].lower().endswith(_FILE_ENDINGS):
            return None
    modelscope = given == "modelscope://" or (not given and environ.get("USE_MODELSCOPE_HUB") == "1")
    return HubId(match["name"], match["revision"], "modelscope" if modelscope else "huggingface")


def with_local_folders(job: Any) -> tuple[Any, list[str]]:
    """The job with the folders of snapshots in the place of hub ids, and a notice for each; nothing is downloaded
    for a dry run.

    Raises:
        Refused: there is no such folder, and the hub does not give such a model either.
    """
    notices: list[str] = []
    ids: dict[str, str] = {}
    trusted = bool(getattr(getattr(job, "tokenizer", None), "trust_remote_code", False))
    dry = bool(getattr(job.runtime, "dry_run", False))

    # There the inputs are names in dataset_info.json.
    named = (
        getattr(getattr(job, "preprocess", None), "handler_name", None) == "LlamaFactoryInstructionHandler"
    )

    def local(value: str, flag: str, kind: str) -> str:
        if kind == "dataset" and "," in value and not Path(value).exists():
            return ",".join(local(part.strip(), flag, kind) for part in value.split(","))
        found = None if kind == "dataset" and named else hub_id(value)
        if found is None:
            return value
        folder = _snapshot(found, flag, kind, trusted, dry)
        if folder is None:
            return value
        where = "in the cache" if dry else "of the hub"
        notices.append(f"{flag} {value}: {found.hub} {kind} {where}, at {folder}")
        ids[str(folder)] = found.of_commit(folder)
        return str(folder)

    for section_name, field, flag, kind in _FIELDS:
        section = getattr(job, section_name, None)
        value = getattr(section, field, None)
        if section is None or not value:
            continue
        new: Any = (
            local(value, flag, kind)
            if isinstance(value, str)
            else tuple(local(part, flag, kind) for part in value)
        )
        if new != value:
            job = dataclasses.replace(job, **{section_name: dataclasses.replace(section, **{field: new})})
    return dataclasses.replace(job, hub_ids=ids) if ids else job, notices


def _snapshot(found: HubId, flag: str, kind: str, trusted: bool, cached_only: bool) -> Path | None:
    """The folder of a snapshot; None where only the cache may be asked and does not hold it."""
    download = _from_modelscope if found.hub == "modelscope" else _from_hugging_face
    patterns = [*_PATTERNS[kind], *(["*.py"] if trusted else [])]
    if cached_only:
        with suppress(Refused):
            return download(found, flag, kind, patterns, True)
        return None
    with _one_at_a_time(f"{found.hub} {kind} {found} {patterns}") as note:
        folder = _noted(note)
        if folder is None:
            folder = download(found, flag, kind, patterns, False)
            _write_note(note, folder)
    return folder


def _from_hugging_face(
    found: HubId, flag: str, kind: str, patterns: list[str], cached_only: bool
) -> Path | None:
    import huggingface_hub
    from huggingface_hub import constants, errors
    from huggingface_hub.utils.tqdm import disable_progress_bars

    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        disable_progress_bars()
    repo_type = "dataset" if kind == "dataset" else "model"

    def snapshot(allow: list[str], ignore: list[str] | None = None) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                found.name,
                repo_type=repo_type,
                revision=found.revision,
                allow_patterns=allow,
                ignore_patterns=ignore,
                local_files_only=cached_only,
            )
        )

    try:
        # Old models hold the same weights as pickles too, which are read only where there is nothing else.
        folder = snapshot(patterns, ["*.bin"])
        if kind == "model" and not any(folder.glob("**/*.safetensors")):
            folder = snapshot(patterns)
        return folder
    except errors.RevisionNotFoundError as error:
        raise _refused(flag, found, f"{endpoint} has no such revision of it") from error
    except errors.GatedRepoError as error:
        raise _refused(
            flag, found, f"{endpoint} gives it only to those who accepted its terms; log in (hf auth login)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise _refused(
            flag, found, f"{endpoint} has no such {repo_type}, or only for those who log in (hf auth login)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        offline = constants.HF_HUB_OFFLINE or cached_only
        why = "HF_HUB_OFFLINE is set" if offline else f"{endpoint} cannot be reached"
        raise _refused(
            flag, found, f"{why}, and the cache {constants.HF_HUB_CACHE} does not hold it whole"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _refused(flag, found, f"{endpoint} does not give it: {reason[:200]}") from error


def _from_modelscope(
    found: HubId, flag: str, kind: str, patterns: list[str], cached_only: bool
) -> Path | None:
    try:
        modelscope: Any = importlib.import_module("modelscope")
    except ImportError as error:
        raise _refused(
            flag, found, "ModelScope is asked for and its package is not installed; pip install modelscope"
        ) from error
    download: Callable[..., str] = modelscope.snapshot_download
    options: dict[str, str] = {} if found.revision is None else {"revision": found.revision}
    if kind == "dataset":
        # The package's function for data sets alone does not know local_files_only.
        options["repo_type"] = kind
    offline = cached_only or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        return Path(download(found.name, allow_patterns=patterns, local_files_only=offline, **options))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _refused(flag, found, f"ModelScope does not give it: {reason[:200]}") from error


def _refused(flag: str, found: HubId, why: str) -> Refused:
    return Refused(
        f"{flag} {found}: no such folder here, and as the id of a {found.hub} repository: {why}; "
        "correct the path or the id"
    )


@contextmanager
def _one_at_a_time(what: str) -> Iterator[IO[str] | None]:
    """A file of this node that one process holds at a time; None where no such file can be made."""
    from huggingface_hub import constants

    name = hashlib.sha256(what.encode()).hexdigest()[:24]
    try:
        folder = Path(constants.HF_HOME) / "mindspeed_lora"
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f"{name}.lock").open("a+", encoding="utf-8")
    except OSError:
        # A cache that cannot be written to has nothing to download into either.
        yield None
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _noted(note: IO[str] | None) -> Path | None:
    """What another process noted since this one started: of the same job, or as new as this one's would be."""
    if note is None or os.fstat(note.fileno()).st_mtime <= _STARTED:
        return None
    note.seek(0)
    text = note.read().strip()
    return Path(text) if text and Path(text).is_dir() else None


def _write_note(note: IO[str] | None, folder: Path | None) -> None:
    if note is None or folder is None:
        return
    note.truncate(0)
    note.write(f"{folder}\n")
    note.flush()
