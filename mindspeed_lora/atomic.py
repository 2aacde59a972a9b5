"""Writing a folder or file so that a kill at any moment leaves the old content or the new one, whole.

Everything is written to a sibling ``.<target>.tmp-*``, flushed to disk, then moved into place in one step.
Where a folder is replaced, the two are exchanged in one step (Linux ``renameat2``); a file system that
cannot do so sees the old one as ``.<target>.old`` for an instant, and the next start puts it back. The
writer holds a lock on its temporary sibling, so that the next start can tell one that was left behind from
one in use.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mindspeed_lora.errors import Refused

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


@contextmanager
def atomic_directory(
    target: Path,
    overwrite: bool = False,
    adopt: Callable[[Path], bool] | None = None,
    keep_on_failure: bool = False,
) -> Iterator[Path]:
    """Give a temporary folder to fill; on leaving without an exception it becomes ``target``.

    Args:
        target: the folder to make or to replace.
        overwrite: whether a target that holds something may be replaced.
        adopt: tells whether the temporary folder of a killed writer is to be gone on with; None removes it.
        keep_on_failure: leave the temporary folder where an exception ends the work, for the next start to adopt.
    """
    staging = StagedDirectory(target, overwrite, adopt)
    try:
        yield staging.path
        staging.commit()
    except BaseException:
        if keep_on_failure:
            staging.release()
        raise
    finally:
        staging.discard()


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Give the path of a temporary file to write; on leaving without an exception it replaces ``target``."""
    remove_stale(target)
    temporary = _temporary(target)
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, target)
        sync_directory(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_text(target: Path, text: str) -> None:
    """Replace the content of a small text file in one step."""
    with atomic_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def atomic_link(target: Path, destination: str) -> None:
    """Make ``target`` a symbolic link to ``destination``, replacing an existing link in one step."""
    temporary = _temporary(target)
    os.symlink(destination, temporary)
    os.replace(temporary, target)
    sync_directory(target.parent)


def make_folder(folder: Path) -> list[Path]:
    """Make a folder with those above it; returns those that were not there, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders, the innermost first, in which there is nothing."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


class StagedDirectory:
    """A folder that is being written beside its final place.

    For jobs of several processes: one makes it and tells the others its ``path``; when all have written, that
    one commits. :func:`atomic_directory` is the short form for one process.
    """

    def __init__(
        self, target: Path, overwrite: bool = False, adopt: Callable[[Path], bool] | None = None
    ) -> None:
        # A link is followed, so that the folder behind it is replaced and not the link.
        target = target.resolve() if target.is_symlink() else target
        self.target = target
        self._made: list[Path] = []
        try:
            self._made = make_folder(target.parent)
            adopted = _adopt(target, adopt) if adopt is not None else None
            remove_stale(target)
            check_target(target, overwrite)
            self.path = adopted[0] if adopted else _temporary(target)
            if adopted is None:
                self.path.mkdir()
        except OSError as error:
            remove_empty(self._made)
            raise Refused(f"{target}: cannot be written ({error.strerror}: {error.filename}).") from error
        self._lock: int | None = adopted[1] if adopted else _lock(self.path)

    def commit(self) -> None:
        """Flush everything to disk and move the folder to its place, over the old one if there is one."""
        sync_tree(self.path)
        if self.target.exists():
            _replace_directory(self.path, self.target)
        else:
            os.rename(self.path, self.target)
        sync_directory(self.target.parent)
        self.discard()

    def release(self) -> None:
        """Leave the temporary folder as it is, for a later start."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Remove what is left of the temporary folder, and the folders made for it; harmless after a commit."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            remove_empty(self._made)
            os.close(self._lock)
            self._lock = None


def _adopt(target: Path, adopt: Callable[[Path], bool]) -> tuple[Path, int] | None:
    """The first temporary sibling of a killed writer that ``adopt`` takes, and its lock."""
    for temporary in sorted(_siblings(target)):
        lock = _lock(temporary)
        if lock is not None:
            if temporary.is_dir() and adopt(temporary):
                return temporary, lock
            os.close(lock)
    return None


def _siblings(target: Path) -> Iterator[Path]:
    """The temporary siblings of a target."""
    return target.parent.glob(f".{_glob_escape(target.name)}.tmp-*")


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that exists and holds something, unless it may be overwritten."""
    if target.is_dir():
        if any(target.iterdir()) and not overwrite:
            raise Refused(
                f"{target} exists and is not empty; give --overwrite to replace it, or another folder."
            )
    elif target.exists():
        raise Refused(f"{target} is a file; expected a folder to write.")


def remove_stale(target: Path) -> None:
    """Clean up after a killed writer of ``target``: restore the old content, remove temporary siblings."""
    old = _old(target)
    if old.exists():
        if target.exists():
            _remove(old)
        else:
            os.rename(old, target)
    for temporary in _siblings(target):
        lock = _lock(temporary)
        if lock is not None:
            _remove(temporary)
            os.close(lock)


def sync_file(path: Path) -> None:
    """Flush a file to disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_directory(path: Path) -> None:
    """Flush a folder's list of entries to disk, where the file system allows that."""
    with suppress(OSError):
        sync_file(path)


def sync_tree(path: Path) -> None:
    """Flush a folder and everything in it to disk."""
    for folder, _, files in os.walk(path, topdown=False):
        for name in files:
            file = Path(folder, name)
            if not file.is_symlink():
                sync_file(file)
        sync_directory(Path(folder))


def exchange(one: Path, two: Path) -> bool:
    """Exchange two paths in one step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(two))


def _replace_directory(new: Path, target: Path) -> None:
    if exchange(new, target):
        return
    old = _old(target)
    os.rename(target, old)
    os.rename(new, target)
    sync_directory(target.parent)
    shutil.rmtree(old)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")


def _glob_escape(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _lock(path: Path) -> int | None:
    """Lock a temporary sibling and return its descriptor, or None while another process holds it."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError:
        return file
    return file
