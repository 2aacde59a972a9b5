"""The commands of docs/getting_started.md, one after the other as a new user types them, on a toy of the model.

The Chinese page has the same commands (tests/unit/test_docs.py).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import make_model
from tests.unit.data.made_tokenizers import make_tokenizer
from tests.unit.inference.conftest import CHATML

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "getting_started.md"


def clone(folder: Path, fetched: dict[str, Path]) -> None:
    """The project's root as ``make setup`` leaves it, with a toy in the place of what is fetched."""
    (folder / "tools").mkdir(parents=True)
    for name in ("mindspeed_lora", *(file.name for file in ROOT.glob("*.py"))):
        (folder / name).symlink_to(ROOT / name)
    told = "\n".join(f"{name}={path}" for name, path in fetched.items())
    (folder / "tools/fetch_assets.py").write_text(f"print({told!r})\n")
    (folder / ".venv/bin").mkdir(parents=True)
    for name, words in (("python", ""), ("torchrun", " -m torch.distributed.run")):
        program = folder / ".venv/bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable}{words} "$@"\n')
        program.chmod(0o755)


@pytest.mark.slow
def test_every_command_in_turn(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = "<|im_end|>"
    model = make_model(
        "llama",
        tmp_path / "hf",
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    tokenizer.save_pretrained(model)
    rows = [
        {"instruction": f"say {word}", "input": "", "output": word * 3} for word in ("a", "be", "see", "do")
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/alpaca_en_demo.json").write_text(json.dumps(rows * 25))
    clone(tmp_path / "clone", {"PADDED_MODEL": model, "DATA": tmp_path / "data"})
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        **{"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "clone"), "CUDA_VISIBLE_DEVICES": ""},
    }
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=tmp_path / "clone",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    run = tmp_path / "clone/first_run/run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "lm_loss" in line] == list(range(1, 11))
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[-1] < losses[0]
    assert "adapter of rank 16" in ended.stdout
    assert (tmp_path / "clone/first_run/merged/mg2hf/model.safetensors").is_file()
    assert "You: Name three colours." in ended.stdout
