"""What a container allows: no root, nothing to write but the run's folder and a temporary one, little memory."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.launch import ROOT
from tests.support.models import VOCAB_SIZE, make_model
from tests.support.rows import random_rows, write_rows
from tests.support.tiny import Tiny

CONFINE = r"""
set -e
mount --bind "$WRITABLE" "$WRITABLE"
mount -t tmpfs -o size=64k tmpfs /dev/shm
mount -o remount,bind,ro /
exec setpriv $USER_FLAGS "$@"
"""
USERS = {
    "nobody": "--reuid 65534 --regid 65534 --clear-groups",
    # Where nobody may not even run Python: an owner without any right of root's.
    "root without its rights": "--bounding-set=-all --inh-caps=-all",
}


TRIED = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import yaml'], check=True)"
"""Python, started by Python: setpriv itself may start what its user may not."""


@dataclass(frozen=True)
class Confinement:
    """A read-only root, 64 kB of /dev/shm, one folder to write to, and a user without rights."""

    folder: Path
    user: str

    def run(self, words: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Runs a command in it."""
        return subprocess.run(
            ["unshare", "--mount", "bash", "-c", CONFINE, "confined", *words],
            env={**environ, "WRITABLE": str(self.folder), "USER_FLAGS": USERS[self.user]},
            cwd="/",
            capture_output=True,
            text=True,
        )


@pytest.fixture
def confinement() -> Iterator[Confinement]:
    """Skipped where this user may not mount."""
    if shutil.which("unshare") is None or shutil.which("setpriv") is None:
        pytest.skip("no unshare or setpriv")
    with tempfile.TemporaryDirectory(prefix="confined_") as name:
        folder = Path(name)
        folder.chmod(0o777)
        for user in USERS:
            found = Confinement(folder, user)
            told = found.run([sys.executable, "-c", TRIED], dict(os.environ))
            if told.returncode == 0:
                yield found
                return
        pytest.skip(f"cannot be confined here: {told.stderr.strip()[-200:]}")


@pytest.mark.slow
def test_a_read_only_root_and_no_rights(confinement: Confinement, tiny: Tiny) -> None:
    scratch = confinement.folder
    home = {name: str(scratch) for name in ("HOME", "TMPDIR", "HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR")}
    environ = {**home, "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    shutil.copytree(tiny.model, scratch / "model")
    for path in tiny.data.parent.glob(f"{tiny.data.name}*"):
        shutil.copy(path, scratch)
    for path in scratch.rglob("*"):
        path.chmod(0o755)
    job = {"load": scratch / "model", "data_path": scratch / tiny.data.name, "save": scratch / "run"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*launch, str(ROOT / "posttrain_gpt.py"), *tiny.words(**job, tensor_model_parallel_size=2)]
    ended = confinement.run(words, environ)
    assert ended.returncode == 0, ended.stderr
    assert (scratch / "run" / "iter_0000004" / "adapter" / "adapter_model.safetensors").is_file()
    refused = confinement.run([*words, "--save", "/nowhere"], environ)
    assert "--save /nowhere: cannot be written to" in refused.stderr


def test_out_of_memory_is_one_sentence(tmp_path: Path) -> None:
    """Activations of 64 long rows in 400 MB more than the process has after its imports."""
    sizes = {"max_position_embeddings": 2048, "hidden_size": 256, "intermediate_size": 1024}
    model = make_model("llama", tmp_path / "model", **sizes)
    (row,) = random_rows(1, VOCAB_SIZE)
    long = dataclasses.replace(row, input_ids=[5] * 1000, labels=[5] * 1000)
    data = write_rows(tmp_path / "rows", [long] * 64)
    words = ["--load", model, "--data-path", data, "--lora-r", "4", "--seq-length", "1024"]
    words += ["--micro-batch-size", "64", "--global-batch-size", "64", "--train-iters", "1", "--lr", "1e-3"]
    limited = (
        "import runpy, resource, sys\n"
        "import torch, mindspeed_lora.device.megatron_import as m; m.import_megatron()\n"
        "import mindspeed_lora.training.main\n"
        "mapped = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (mapped + (900 << 20),) * 2)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", limited, str(ROOT / "posttrain_gpt.py"), *map(str, words)]
    ended = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=250
    )
    assert ended.returncode == 1, ended.stderr
    (sentence,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "out of memory in step 1, forward and backward passes: activations take" in sentence
    assert "--micro-batch-size" in sentence and "brings that to" in sentence
    assert "Traceback" not in ended.stderr
