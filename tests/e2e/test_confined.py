"""What a container allows: no root, nothing to write but the run's folder and a temporary one, little memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import ROOT
from tests.support.models import make_model
from tests.support.rows import random_rows, write_rows
from tests.support.tiny import Tiny

CONFINE = r"""
set -e
mount --bind "$WRITABLE" "$WRITABLE"
mount -t tmpfs -o size=64k tmpfs /dev/shm
mount -o remount,bind,ro /
exec setpriv --reuid 65534 --regid 65534 --clear-groups "$@"
"""


def confined(words: list[str], writable: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A command as nobody, with a root that is read-only, 64 kB of /dev/shm and one folder to write to."""
    return subprocess.run(
        ["unshare", "--mount", "bash", "-c", CONFINE, "confined", *words],
        env={**environ, "WRITABLE": str(writable)},
        cwd="/",
        capture_output=True,
        text=True,
    )


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A folder of nobody's; skipped where this user may not become nobody, or nobody may not run Python."""
    if shutil.which("unshare") is None or shutil.which("setpriv") is None:
        pytest.skip("no unshare or setpriv")
    folder = tmp_path / "scratch"
    folder.mkdir()
    folder.chmod(0o777)
    for parent in tmp_path.parents:
        if parent.stat().st_mode & 0o1 == 0 and parent.owner() == "root" and os.getuid() == 0:
            parent.chmod(parent.stat().st_mode | 0o11)
    tmp_path.chmod(0o755)
    tried = confined([sys.executable, "-c", "import torch"], folder, dict(os.environ))
    if tried.returncode:
        pytest.skip(f"cannot be confined here: {tried.stderr.strip()[-200:]}")
    return folder


def test_a_read_only_root_and_nobody(scratch: Path, tiny: Tiny) -> None:
    home = {name: str(scratch) for name in ("HOME", "TMPDIR", "HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR")}
    environ = {**home, "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    shutil.copytree(tiny.model, scratch / "model")
    for path in tiny.data.parent.glob(f"{tiny.data.name}*"):
        shutil.copy(path, scratch)
    job = {"load": scratch / "model", "data_path": scratch / tiny.data.name, "save": scratch / "run"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*launch, str(ROOT / "posttrain_gpt.py"), *tiny.words(**job, tensor_model_parallel_size=2)]
    ended = confined(words, scratch, environ)
    assert ended.returncode == 0, ended.stderr
    assert (scratch / "run" / "iter_0000004" / "adapter" / "adapter_model.safetensors").is_file()
    assert (scratch / "run" / "metrics.jsonl").owner() == "nobody"


def test_out_of_memory_is_one_sentence(tmp_path: Path) -> None:
    """Activations of 64 long rows in 400 MB more than the process has after its imports."""
    sizes = {"max_position_embeddings": 2048, "hidden_size": 256, "intermediate_size": 1024}
    model = make_model("llama", tmp_path / "model", **sizes)
    data = write_rows(tmp_path / "rows", random_rows(64, 131, longest=1024, shortest=1000))
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
