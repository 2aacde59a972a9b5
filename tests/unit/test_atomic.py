"""A kill at any step of writing leaves the old content or the new one, whole; the next start cleans up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mindspeed_lora import atomic
from mindspeed_lora.atomic import (
    StagedDirectory,
    atomic_directory,
    atomic_file,
    atomic_link,
    atomic_text,
    exchange,
)
from mindspeed_lora.errors import Refused


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, mark: str) -> None:
    (folder / "sub").mkdir()
    (folder / "a").write_text(mark)
    (folder / "sub" / "b").write_text(mark)


def whole(mark: str) -> dict[str, str]:
    return {"a": mark, "sub/b": mark}


def write(target: Path, mark: str, overwrite: bool = True) -> None:
    with atomic_directory(target, overwrite) as folder:
        fill(folder, mark)


@pytest.fixture(params=[True, False], ids=["exchange", "no-exchange"])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the file system's own exchange, and on one that has none."""
    if not request.param:
        monkeypatch.setattr(atomic, "exchange", lambda one, two: False)
    return bool(request.param)


def test_new_and_replaced_folder(tmp_path: Path, exchanges: bool):
    target = tmp_path / "deep" / "er" / "target"
    write(target, "old")
    assert content(target) == whole("old")
    (target / "extra").write_text("goes away")
    write(target, "new")
    assert content(target) == whole("new")
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_exchange_is_one_step_here(tmp_path: Path):
    fill_one, fill_two = tmp_path / "one", tmp_path / "two"
    fill_one.mkdir()
    fill_two.mkdir()
    (fill_one / "1").touch()
    assert exchange(fill_one, fill_two)
    assert (fill_two / "1").exists()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "absent", fill_two)


def test_existing_target_needs_overwrite(tmp_path: Path):
    write(tmp_path / "target", "old")
    with pytest.raises(Refused, match="exists and is not empty; give --overwrite"):
        write(tmp_path / "target", "new", overwrite=False)
    assert content(tmp_path / "target") == whole("old")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "new", overwrite=False)
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="is a file"):
        write(tmp_path / "file", "new")


def test_an_exception_leaves_the_old_content(tmp_path: Path):
    write(tmp_path / "target", "old")
    with pytest.raises(OSError, match="full"), atomic_directory(tmp_path / "target", True) as folder:
        fill(folder, "new")
        raise OSError("full")
    assert content(tmp_path / "target") == whole("old")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_parent_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="cannot be written"):
        write(tmp_path / "file" / "target", "new")


def test_the_folder_behind_a_link_is_replaced(tmp_path: Path, exchanges: bool):
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == whole("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_modes_follow_the_umask(tmp_path: Path):
    mask = os.umask(0o022)
    try:
        write(tmp_path / "target", "new")
    finally:
        os.umask(mask)
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o755


def test_file_and_link(tmp_path: Path):
    atomic_text(tmp_path / "latest", "1")
    atomic_text(tmp_path / "latest", "2")
    assert (tmp_path / "latest").read_text() == "2"
    with pytest.raises(OSError, match="full"), atomic_file(tmp_path / "latest") as temporary:
        temporary.write_text("3")
        raise OSError("full")
    atomic_link(tmp_path / "link", "latest")
    atomic_link(tmp_path / "link", "other")
    assert os.readlink(tmp_path / "link") == "other"
    assert (tmp_path / "latest").read_text() == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "link"]


def test_a_temporary_folder_in_use_is_left_alone(tmp_path: Path):
    staging = StagedDirectory(tmp_path / "target")
    fill(staging.path, "first")
    write(tmp_path / "target", "second")
    assert staging.path.is_dir()
    staging.commit()
    assert content(tmp_path / "target") == whole("first")
    staging.discard()


def test_stale_siblings_of_other_targets_stay(tmp_path: Path):
    (tmp_path / ".other.tmp-1").mkdir()
    (tmp_path / ".target.tmp-1").mkdir()
    (tmp_path / ".target.tmp-2").write_text("half")
    write(tmp_path / "target", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.tmp-1", "target"]


KILLED_WRITER = textwrap.dedent(
    """
    import os, shutil, signal, sys
    from pathlib import Path
    from mindspeed_lora import atomic

    target, step, can_exchange = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1"
    count = 0

    def counted(function):
        def call(*args, **kwargs):
            global count
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return function(*args, **kwargs)
        return call

    def rmtree(path, ignore_errors=False):
        if ignore_errors and not os.path.isdir(path):
            return
        for name in sorted(os.listdir(path)):
            shutil_rmtree(os.path.join(path, name)) if name == "sub" else os.unlink(os.path.join(path, name))
        os.rmdir(path)

    shutil_rmtree = shutil.rmtree
    if not can_exchange:
        atomic.exchange = lambda one, two: False
    else:
        atomic.exchange = counted(atomic.exchange)
    shutil.rmtree = rmtree
    for name in ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "write"):
        setattr(os, name, counted(getattr(os, name)))
    with atomic.atomic_directory(target, True) as folder:
        os.mkdir(folder / "sub")
        for file in ("a", "sub/b"):
            number = os.open(folder / file, os.O_WRONLY | os.O_CREAT)
            os.write(number, b"n")
            os.write(number, b"ew")
            os.close(number)
    """
)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_kill_at_every_step(tmp_path: Path, can_exchange: bool):
    target, outcomes = tmp_path / "target", []
    for step in range(60):
        write(target, "old")
        argv = [sys.executable, "-c", KILLED_WRITER, str(target), str(step), str(int(can_exchange))]
        status = subprocess.run(argv, check=False).returncode
        assert status in (0, -signal.SIGKILL)
        if status == 0:
            break
        before = {path.name for path in tmp_path.iterdir()}
        if can_exchange:
            assert content(target) in (whole("old"), whole("new"))
        atomic.remove_stale(target)
        assert content(target) in (whole("old"), whole("new")), (step, before)
        assert [path.name for path in tmp_path.iterdir()] == ["target"]
        outcomes.append(content(target)["a"])
    else:
        raise AssertionError("the writer never ended")
    assert content(target) == whole("new")
    assert outcomes[0] == "old" and outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, key=["old", "new"].index)


def test_folders_made_for_what_failed_are_gone(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "new" / "newer" / "target"
    with pytest.raises(ValueError, match="halfway"), atomic_directory(target) as folder:
        fill(folder, "one")
        raise ValueError("halfway")
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with pytest.raises(ValueError, match="halfway"), atomic_directory(target, keep_on_failure=True) as folder:
        raise ValueError("halfway")
    assert folder.is_dir(), "for a later start"
    (target.parent / "others").touch()
    with pytest.raises(ValueError, match="halfway"), atomic_directory(target):
        raise ValueError("halfway")
    assert [path.name for path in target.parent.iterdir()] == ["others"]
