"""A conversion from a hub id that lies in the cache alone, and once more from the config.yaml that it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.support.launch import ROOT
from tests.support.tiny import Tiny

COMMIT = "8f1c2d3e4b5a69788796a5b4c3d2e1f001122334"
TWICE = """
import sys
from mindspeed_lora.entry import convert
for words in (sys.argv[1:], ["--config", sys.argv[-1] + "/config.yaml", "--save-dir", sys.argv[-1] + "_again"]):
    sys.argv = ["convert_ckpt.py", *words]
    try:
        convert()
    except SystemExit as end:
        if end.code:
            raise
"""


def test_a_conversion_tells_the_id(tiny: Tiny, tmp_path: Path) -> None:
    home = tmp_path / "home"
    cached = home / "hub" / "models--org--tiny"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "snapshots" / COMMIT).symlink_to(tiny.model)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    target = tmp_path / "mg"
    words = ["--load-model-type", "hf", "--save-model-type", "mg", "--load-dir", "org/tiny"]
    done = subprocess.run(
        [sys.executable, "-c", TWICE, *words, "--save-dir", str(target)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (
        f"notice: --load-dir org/tiny: huggingface model of the hub, at {cached / 'snapshots' / COMMIT}"
        in (done.stderr)
    )
    for folder in (target, tmp_path / "mg_again"):
        assert yaml.safe_load((folder / "config.yaml").read_text())["load-dir"] == f"hf://org/tiny@{COMMIT}"
        (noted,) = folder.rglob("source.json")
        origin = json.loads(noted.read_text())
        assert (origin["hub_id"], origin["revision"]) == ("org/tiny", COMMIT)
    (first,) = target.rglob("*.pt")
    again = tmp_path / "mg_again" / first.relative_to(target)
    assert again.read_bytes() == first.read_bytes()
