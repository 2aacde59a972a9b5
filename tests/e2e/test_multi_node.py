"""Two nodes on this machine, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import ROOT
from tests.support.tiny import Tiny


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_nodes_are_one(rendezvous: str, tiny: Tiny, tmp_path: Path) -> None:
    names = {"MODEL": tiny.model, "DATA": tiny.data, "OUT": tmp_path / "out", "PYTHON": sys.executable}
    environ = {**os.environ, **{name: str(value) for name, value in names.items()}, "RDZV": rendezvous}
    command = [str(ROOT / "examples" / "multi_node.sh"), "--use-distributed-optimizer"]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "two nodes and one: the same losses" in ended.stdout
    assert (tmp_path / "out" / "node1" / "iter_0000004" / "adapter" / "adapter_config.json").is_file()
