import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from package_download import PackageFile, download

from mindspeed_lora.errors import Failed

NAME = "demo-asset"
VERSION = "1.2"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip uses in place of an index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def package_of(file: Path, build_backend: str | None = None) -> PackageFile:
    return PackageFile(
        name=NAME,
        version=VERSION,
        file_name=file.name,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        megabytes=1,
        build_backend=build_backend,
    )


def make_wheel(index: Path) -> Path:
    wheel = index / f"demo_asset-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        info = f"demo_asset-{VERSION}.dist-info"
        archive.writestr("demo_asset/weights.bin", b"weights")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def make_source(index: Path, witness: Path) -> Path:
    """A source distribution whose build backend, were it run, would write ``witness``."""
    backend = f"open({str(witness)!r}, 'w').close()\n"
    project = '[build-system]\nrequires = ["no-such-package-here"]\nbuild-backend = "harmful.build"\n'
    source = index / f"demo_asset-{VERSION}.tar.gz"
    with tarfile.open(source, "w:gz") as archive:
        for name, text in {
            "pyproject.toml": project,
            "setup.py": backend,
            "harmful/__init__.py": backend,
            "harmful/build.py": backend,
            "data/rows.json": "[]",
        }.items():
            member = tarfile.TarInfo(f"demo_asset-{VERSION}/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return source


def test_wheel_is_stored_whole(index: Path, tmp_path: Path) -> None:
    wheel = make_wheel(index)
    received = download(package_of(wheel), tmp_path / "downloads")
    assert received.read_bytes() == wheel.read_bytes()
    assert [path.name for path in received.parent.iterdir()] == [wheel.name]


def test_nothing_of_a_source_distribution_is_run(index: Path, tmp_path: Path) -> None:
    witness = tmp_path / "was_run"
    source = make_source(index, witness)
    received = download(package_of(source, build_backend="harmful.build"), tmp_path / "downloads")
    assert received.read_bytes() == source.read_bytes()
    assert not witness.exists()


def test_other_content_under_the_same_name_is_refused(index: Path, tmp_path: Path) -> None:
    wheel = make_wheel(index)
    package = package_of(wheel)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("demo_asset/extra.py", "")
    with pytest.raises(Failed, match="demo-asset 1.2 could not be downloaded"):
        download(package, tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []


def test_file_put_there_by_hand_needs_no_index(index: Path, tmp_path: Path) -> None:
    wheel = make_wheel(index)
    package = package_of(wheel)
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    wheel.rename(downloads / wheel.name)
    assert download(package, downloads) == downloads / wheel.name


def test_damaged_file_is_downloaded_anew(index: Path, tmp_path: Path) -> None:
    wheel = make_wheel(index)
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / wheel.name).write_bytes(wheel.read_bytes()[:-10])
    assert download(package_of(wheel), downloads).read_bytes() == wheel.read_bytes()


def test_missing_package_is_told_in_one_sentence(index: Path, tmp_path: Path) -> None:
    wheel = make_wheel(index)
    package = package_of(wheel)
    wheel.unlink()
    with pytest.raises(Failed) as error:
        download(package, tmp_path / "downloads")
    message = str(error.value)
    assert "No matching distribution found for demo-asset==1.2" in message
    assert f"put {wheel.name} into {tmp_path / 'downloads'}" in message
    assert "\n" not in message
