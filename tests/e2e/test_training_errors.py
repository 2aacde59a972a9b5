"""What goes wrong in training ends with one sentence, told once by however many ranks, and a non-zero status."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.launch import Ended, Ranks, run_ranks
from tests.support.models import make_model
from tests.support.rows import write_rows
from tests.support.tiny import Tiny

TP2 = {"tensor_model_parallel_size": 2}


class Command:
    """An object whose unpickling makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mknod, (str(self.marker),)


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def peft_adapter(tiny: Tiny, folder: Path, **config: Any) -> Path:
    """An adapter for the tiny model, as PEFT writes it."""
    from tests.support.reference import Reference

    reference = Reference(tiny.model)
    reference.add_adapter(rank=4, alpha=8)
    reference.save_adapter(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


def missing_weights(tiny: Tiny, folder: Path) -> dict[str, Any]:
    (copied(tiny.model, folder / "model") / "model.safetensors").unlink()
    return {"load": folder / "model"}


def empty_weights(tiny: Tiny, folder: Path) -> dict[str, Any]:
    (copied(tiny.model, folder / "model") / "model.safetensors").write_bytes(b"")
    return {"load": folder / "model"}


def truncated_weights(tiny: Tiny, folder: Path) -> dict[str, Any]:
    file = copied(tiny.model, folder / "model") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return {"load": folder / "model"}


def other_shapes(tiny: Tiny, folder: Path) -> dict[str, Any]:
    file = copied(tiny.model, folder / "model") / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name][:-2].clone()}, file, {"format": "pt"})
    return {"load": folder / "model"}


def weights_with_nan(tiny: Tiny, folder: Path) -> dict[str, Any]:
    file = copied(tiny.model, folder / "model") / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][-1, 3] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    return {"load": folder / "model"}


def hostile_pickle(tiny: Tiny, folder: Path) -> dict[str, Any]:
    file = folder / "mcore" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    torch.save({"model": {}, "args": Command(folder / "marker")}, file)
    (folder / "mcore" / "latest_checkpointed_iteration.txt").write_text("1")
    return {"load": folder / "mcore", "tensor_model_parallel_size": 2}


def adapter_of_another_rank(tiny: Tiny, folder: Path) -> dict[str, Any]:
    return {"lora_load": peft_adapter(tiny, folder / "adapter"), "lora_r": 8}


def adapter_with_other_targets(tiny: Tiny, folder: Path) -> dict[str, Any]:
    return {"lora_load": peft_adapter(tiny, folder / "adapter"), "lora_target_modules": "linear_qkv"}


def adapter_for_another_base(tiny: Tiny, folder: Path) -> dict[str, Any]:
    other = Tiny(make_model("qwen2", folder / "other"), tiny.data)
    return {"lora_load": peft_adapter(other, folder / "adapter")}


def adapter_with_part_of_the_keys(tiny: Tiny, folder: Path) -> dict[str, Any]:
    file = peft_adapter(tiny, folder / "adapter") / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensors[name] for name in list(tensors)[:-1]}, file)
    return {"lora_load": folder / "adapter"}


def rows_without_a_row(tiny: Tiny, folder: Path) -> dict[str, Any]:
    return {"data_path": write_rows(folder / "rows", [])}


def truncated_rows(tiny: Tiny, folder: Path) -> dict[str, Any]:
    for file in tiny.data.parent.glob(f"{tiny.data.name}_*"):
        shutil.copy(file, folder / file.name)
    file = folder / f"{tiny.data.name}_packed_labels_document.bin"
    file.write_bytes(file.read_bytes()[:-10])
    return {"data_path": folder / tiny.data.name}


def with_flags(**flags: Any) -> Callable[[Tiny, Path], dict[str, Any]]:
    return lambda tiny, folder: flags


@pytest.mark.parametrize(
    ("job", "told"),
    [
        (with_flags(micro_batch_sise=1), ("--micro-batch-sise", "--micro-batch-size")),
        (with_flags(**TP2, num_layers=5), ("--num-layers 5", "checkpoint: 4")),
        (with_flags(tensor_model_parallel_size=4), ("--tensor-model-parallel-size 4", "2")),
        (with_flags(lora_target_modules="linear_kqv"), ("linear_kqv", "linear_qkv")),
        (with_flags(load="/nowhere"), ("--load /nowhere",)),
        (with_flags(data_path="/nowhere/rows"), ("/nowhere/rows",)),
        (missing_weights, ("model", "safetensors")),
        (empty_weights, ("model.safetensors", "empty")),
        (truncated_weights, ("model.safetensors", "truncated")),
        (other_shapes, ("model.layers.1.mlp.up_proj.weight", "78", "80")),
        (weights_with_nan, ("the loss is nan", "decoder.layers.1.mlp.linear_fc1.weight", "holds NaN")),
        (hostile_pickle, ("model_optim_rng.pt", "posix.mknod", "could run code")),
        (adapter_of_another_rank, ("--lora-r 8", "4")),
        (adapter_with_other_targets, ("--lora-target-modules", "linear_qkv")),
        (adapter_for_another_base, ("adapter",)),
        (adapter_with_part_of_the_keys, ("adapter_model.safetensors", "lora_")),
        (rows_without_a_row, ("rows", "no ")),
        (truncated_rows, ("labels", "cut off")),
    ],
    ids=lambda value: getattr(value, "__name__", None) if callable(value) else "",
)
def test_refused_by_one_sentence(
    job: Callable[[Tiny, Path], dict[str, Any]], told: tuple[str, ...], tiny: Tiny, tmp_path: Path
) -> None:
    save = tmp_path / "run"
    flags = job(tiny, tmp_path)
    ended = run_ranks("posttrain_gpt.py", 2, tiny.words(**{**TP2, **flags}, save=save))
    assert all(status not in (0, -9) for status in ended.statuses), ended.statuses
    assert len(ended.sentences) == 1, ended.errors
    print(ended.sentences[0])
    assert [part for part in told if part not in ended.sentences[0]] == []
    assert not any("Traceback" in text for text in ended.errors)
    assert not (tmp_path / "marker").exists()
    assert not save.exists() or not list(save.glob("iter_*"))


def test_a_dead_rank_is_told_once_and_soon(tiny: Tiny, tmp_path: Path) -> None:
    save = tmp_path / "run"
    job = {**TP2, "train_iters": 100_000, "save_interval": 10, "distributed_timeout_minutes": 0.5}
    with Ranks("posttrain_gpt.py", 2, tiny.words(**job, save=save)) as ranks:
        ranks.wait_until((save / "latest_checkpointed_iteration.txt").exists)
        ranks.kill(1)
        ended = ranks.wait(timeout=45.0)
    assert ended.statuses[1] == -9 and ended.statuses[0] not in (0, -9)
    assert len(ended.sentences) == 1, ended.errors
    assert "Traceback" not in ended.errors[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_checkpoints_before(small_disk: Path, tiny: Tiny) -> None:
    save = small_disk / "run"
    job = {**TP2, "train_iters": 100, "save_interval": 1}
    ended: Ended = run_ranks("posttrain_gpt.py", 2, tiny.words(**job, save=save))
    assert all(status not in (0, -9) for status in ended.statuses), ended.statuses
    assert len(ended.sentences) == 1, ended.errors
    for part in ("no space left on the disk: ", f"make room in {save}", "--resume auto"):
        assert part in ended.sentences[0]
    latest = int((save / "latest_checkpointed_iteration.txt").read_text())
    load_file(save / f"iter_{latest:07d}" / "adapter" / "adapter_model.safetensors")
    assert not list(save.glob(".*.tmp-*"))
