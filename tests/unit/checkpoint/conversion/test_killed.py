"""Conversions that are killed at any moment: nothing is lost, nothing is half-written, and the next start goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mindspeed_lora.checkpoint.storage.manifest import check_files
from mindspeed_lora.checkpoint.storage.tensor_writer import TensorWriter

Convert = Callable[..., None]
ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "more", [(), ("--resume",), ("--qlora-nf4", "--quant-double")], ids=["clean", "resume", "quantised"]
)
def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(
    models, tmp_path: Path, more: tuple[str, ...], kills: int
):
    flags = [
        "--load-dir",
        str(models("llama").path),
        "--save-model-type",
        "hf",
        "--save-dir",
        str(tmp_path / "work"),
    ]
    job = {
        "old": [*flags, "--params-dtype", "bf16"],
        "new": [*flags, "--max-shard-size", "20KB", "--overwrite", *more],
        "target": str(tmp_path / "work" / "mg2hf"),
        "kills": kills,
    }
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.killing", json.dumps(job)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    outcomes = json.loads(ended.stdout.splitlines()[-1])
    assert min(outcomes.values()) > 0, outcomes


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are opened for writing, in order."""
    opened: list[str] = []
    init = TensorWriter.__init__

    def noting(self: TensorWriter, path: Path, layout: object) -> None:
        opened.append(path.name)
        init(self, path, layout)  # type: ignore[arg-type]

    monkeypatch.setattr(TensorWriter, "__init__", noting)
    return opened


@pytest.fixture
def broken_off(
    models, tmp_path: Path, run_convert: Convert, monkeypatch: pytest.MonkeyPatch, written
) -> dict:
    """The flags of a conversion with --resume that ended after some of its files; ``written`` has those."""
    flags = {
        "load_dir": models("llama").path,
        "save_dir": tmp_path,
        "save_model_type": "hf",
        "max_shard_size": "20KB",
    }
    write, left = TensorWriter.write, [9]

    def fails(self: TensorWriter, name: str, tensor: torch.Tensor, at: int | None) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        write(self, name, tensor, at)

    with monkeypatch.context() as patch:
        patch.setattr(TensorWriter, "write", fails)
        with pytest.raises(OSError, match="No space left"):
            run_convert("--resume", **flags)
    # The last one was not finished.
    written.pop()
    assert written
    return flags


def test_resume_goes_on_after_the_last_finished_file(
    broken_off, tmp_path: Path, run_convert: Convert, written: list[str]
):
    finished = written.copy()
    written.clear()
    run_convert("--resume", **broken_off)
    names = sorted(path.name for path in (tmp_path / "mg2hf").glob("*.safetensors"))
    assert written and finished + written == names
    assert check_files(tmp_path / "mg2hf") == sum(
        (tmp_path / "mg2hf" / name).stat().st_size for name in names
    )
    assert not list((tmp_path / "mg2hf").glob(".*"))


@pytest.mark.parametrize("resume", [["--resume"], []])
def test_another_conversion_is_not_gone_on_with(
    broken_off, tmp_path: Path, run_convert: Convert, written: list[str], capsys, resume: list[str]
):
    written.clear()
    run_convert(*resume, params_dtype="bf16", **broken_off)
    assert ("other flags or files; starting anew" in capsys.readouterr().err) == bool(resume)
    assert len(written) == len(list((tmp_path / "mg2hf").glob("*.safetensors")))
    assert [path.name for path in tmp_path.iterdir()] == ["mg2hf"]
