import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fetch_assets
import pytest

from mindspeed_lora.errors import Refused

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def assets() -> dict[str, Path]:
    return fetch_assets.fetch(fetch_assets.default_cache())


@pytest.fixture
def cache(tmp_path: Path, assets: dict[str, Path]) -> Path:
    """A second cache with the two models (links: they are large) and without the data."""
    for name in ("MODEL", "PADDED_MODEL"):
        (tmp_path / assets[name].name).symlink_to(assets[name])
    return tmp_path


def source_archive(cache: Path, assets: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the data's download give an archive made from the real cache, so that no index is asked."""
    import tarfile

    archive_path = cache / "source.tar.gz"
    with tarfile.open(archive_path, "w:gz") as archive:
        for path in assets["DATA"].iterdir():
            folder = "llamafactory-0.9.5" if path.name == "LICENSE" else "llamafactory-0.9.5/data"
            archive.add(path, f"{folder}/{path.name}")
        archive.add(assets["DATA"] / "identity.json", "llamafactory-0.9.5/data/../../escaped.json")
    monkeypatch.setattr(fetch_assets, "download", lambda package, folder: archive_path)


def test_data_are_the_published_rows(assets: dict[str, Path]) -> None:
    rows = json.loads((assets["DATA"] / "alpaca_en_demo.json").read_text())
    assert len(rows) == 999
    assert set(rows[0]) == {"instruction", "input", "output"}
    names = {path.name for path in assets["DATA"].iterdir()}
    assert {"dpo_en_demo.json", "glaive_toolcall_en_demo.json", "alpaca_zh_demo.json", "LICENSE"} <= names


def test_missing_part_alone_is_made(
    cache: Path, assets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source_archive(cache, assets, monkeypatch)
    stale = cache / ".data.tmp-1"
    stale.mkdir()
    made = fetch_assets.fetch(cache)
    assert made == {key: cache / path.name for key, path in assets.items()}
    assert (cache / assets["MODEL"].name).is_symlink()
    assert (made["DATA"] / "alpaca_en_demo.json").read_bytes() == (
        assets["DATA"] / "alpaca_en_demo.json"
    ).read_bytes()
    assert not stale.exists()
    assert not (cache.parent / "escaped.json").exists()


def test_folder_of_an_older_recipe_is_made_anew(
    cache: Path, assets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source_archive(cache, assets, monkeypatch)
    shutil.copytree(assets["DATA"], cache / "data")
    (cache / "data" / "asset.json").write_text('{"recipe": 0}')
    (cache / "data" / "left_over").touch()
    fetch_assets.fetch(cache)
    assert not (cache / "data" / "left_over").exists()


def test_kill_leaves_no_folder_that_looks_whole(
    cache: Path, assets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source_archive(cache, assets, monkeypatch)
    pid = os.fork()
    if pid == 0:
        # Killed between the last byte written and the rename.
        monkeypatch.setattr(fetch_assets, "_flush", lambda path: os.kill(os.getpid(), signal.SIGKILL))
        fetch_assets.fetch(cache)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert not (cache / "data").exists()
    fetch_assets.fetch(cache)
    assert (cache / "data" / "alpaca_en_demo.json").is_file()
    assert list(cache.glob(".data.tmp-*")) == []


def test_full_disk_is_refused_before_any_download(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_assets, "NEEDED_GIGABYTES", 1e9)
    with pytest.raises(Refused, match="GB free, and the model and data need"):
        fetch_assets.fetch(cache)


def test_command_prints_the_paths_alone(assets: dict[str, Path]) -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "tools" / "fetch_assets.py"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PIP_NO_INDEX": "1"},
    )
    assert result.stdout == "".join(f"{key}={path}\n" for key, path in assets.items())


def test_command_ends_with_one_sentence(cache: Path) -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "tools" / "fetch_assets.py", "--cache", str(cache)],
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
        | {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull},
    )
    assert result.returncode == 1
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: llamafactory 0.9.5 could not be downloaded: pip said ")
    assert "Traceback" not in result.stderr
