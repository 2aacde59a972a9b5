"""Every run writes its full configuration, and given again it makes the same files."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from mindspeed_lora import entry
from mindspeed_lora.config.commands import parse
from tests.support.pool import WorkerPool
from tests.support.tiny import Tiny
from tests.support.training import train_recorded
from tests.unit.data.made_tokenizers import save_tokenizer

EXACT = ("iteration", "lm_loss", "grad_norm", "learning_rate", "tokens", "loss_tokens")


def done(command: str, words: list[str], function: Callable[[Any], int | None]) -> None:
    with pytest.raises(SystemExit) as left:
        entry.run(command, words, function)
    assert left.value.code == 0


def trained(words: list[str]) -> int:
    """The status of a training."""
    from mindspeed_lora.training.main import train

    return train(parse("posttrain", words))


def metrics(save: Path) -> list[list[Any]]:
    lines = (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [[record[key] for key in EXACT] for record in map(json.loads, lines)]


def test_a_training_run(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    words = tiny.words(
        save=tmp_path / "one",
        lora_target_modules=("q_proj", "linear_fc2"),
        lora_rank_pattern='{"q_proj": 2}',
        lora_dropout=0.1,
        padded_samples=True,
        global_batch_size=5,
        train_iters=None,
        epochs=2,
        lr=3e-3,
        lr_decay_style="cosine",
        variable_seq_lengths=True,
        seed=7,
        swap_optimizer=True,
    )
    assert workers.run(1, trained, words) == [0]
    file = tmp_path / "one" / "config.yaml"
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert written["paged-optimizer"] and written["lora-r"] == 4 and written["lr"] == 3e-3
    assert workers.run(1, trained, ["--config", str(file), "--save", str(tmp_path / "two")]) == [0]
    # Twelve rows in batches of five: three batches an epoch with --padded-samples.
    assert len(metrics(tmp_path / "one")) == 6
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
    one, two = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)
    of_two = yaml.safe_load((tmp_path / "two" / "config.yaml").read_text(encoding="utf-8"))
    assert {name for name in of_two if of_two[name] != written[name]} == {"save"}


def test_an_interval_of_leaving(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    words = tiny.words(save=tmp_path / "run", exit_interval=3, manual_gc=True, manual_gc_interval=2)
    assert workers.run(1, trained, words) == [0]
    assert len(metrics(tmp_path / "run")) == 3
    assert workers.run(1, trained, [*words, "--resume", "auto"]) == [0]
    assert len(metrics(tmp_path / "run")) == 4


def told_to_leave(session: object) -> None:
    """A signal before the first step."""
    os.kill(os.getpid(), signal.SIGTERM)


def test_leaving_without_a_folder_keeps_nothing_and_says_so(workers: WorkerPool, tiny: Tiny) -> None:
    (record,) = workers.run(1, train_recorded, tiny.words(), None, told_to_leave)
    assert record.notices[-1] == (
        "SIGTERM received: leaving without --save, so nothing is kept, after iteration 1"
    )


def test_a_conversion(tiny: Tiny, tmp_path: Path) -> None:
    words = ["--load-dir", str(tiny.model), "--save-dir", str(tmp_path / "one"), "--save-model-type", "mg"]
    done("convert", [*words, "--target-tensor-parallel-size", "2", "--params-dtype", "bf16"], entry._convert)
    again = ["--config", str(tmp_path / "one" / "config.yaml"), "--save-dir", str(tmp_path / "two")]
    done("convert", again, entry._convert)
    one, two = (
        {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.name != "config.yaml"
        }
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two and any("mp_rank_01" in name for name in one)
    assert (tmp_path / "two" / "config.yaml").is_file()


def test_a_preparation(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "rows.json").write_text(json.dumps([{"q": "Count.", "a": "one"}, {"q": "More.", "a": "two"}]))
    words = ["--input", str(tmp_path / "rows.json"), "--tokenizer-name-or-path", str(tokenizer)]
    words += [
        "--handler-name",
        "AlpacaStyleInstructionHandler",
        "--map-keys",
        '{"prompt": "q", "response": "a"}',
    ]
    words += ["--seq-length", "32", "--neat-pack", "--output-prefix", str(tmp_path / "one")]
    done("preprocess", words, entry._preprocess)
    again = ["--config", str(tmp_path / "one_config.yaml"), "--output-prefix", str(tmp_path / "two")]
    done("preprocess", again, entry._preprocess)
    for key in ("input_ids", "attention_mask", "labels"):
        one, two = (tmp_path / f"{prefix}_packed_{key}_document.bin" for prefix in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
