"""Running convert_ckpt.py's commands within the test's process, and what they look at."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mindspeed_lora.entry import convert

ROOT = Path(__file__).parents[4]


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    error: str

    @property
    def last(self) -> str:
        """The last line of standard output."""
        return self.out.splitlines()[-1]

    @property
    def refusal(self) -> str:
        """The one line on standard error of a command that was refused."""
        (line,) = self.error.splitlines()
        assert line.startswith("error: ")
        return line


Command = Callable[..., Outcome]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs convert_ckpt.py on words: its own entry function, with its status and output."""

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["convert_ckpt.py", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            convert()
        assert isinstance(left.value.code, int)
        return Outcome(left.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny) -> Path:
    """The --save folder of a real training of two steps, both saved, with the base beside the adapter."""
    save = tmp_path_factory.mktemp("trained") / "run"
    words = tiny.words(save=save, train_iters=2, save_interval=1, lora_save_base=True)
    subprocess.run([sys.executable, "posttrain_gpt.py", *words], cwd=ROOT, check=True, capture_output=True)
    return save


@pytest.fixture(scope="session")
def peft_adapter(tmp_path_factory: pytest.TempPathFactory, models) -> Callable[..., Path]:
    """Makes and saves an adapter by PEFT itself, on a model of a kind."""
    import peft
    import torch

    def make(kind: str = "llama", **values: object) -> Path:
        torch.manual_seed(0)
        given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **values}
        model = peft.get_peft_model(models(kind).load(), peft.LoraConfig(task_type="CAUSAL_LM", **given))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.1)
        folder = tmp_path_factory.mktemp("adapters") / "mine"
        model.save_pretrained(folder)
        return folder

    return make
