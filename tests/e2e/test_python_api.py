"""The Python API does what the commands do, in one process and over several ranks."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mindspeed_lora
from mindspeed_lora import Failed, Refused, errors
from mindspeed_lora.config.commands import parse
from tests.support.generation import infer_on_rank
from tests.support.models import make_model
from tests.support.pool import WorkerPool
from tests.support.tiny import DEFAULTS, Tiny
from tests.support.training import train
from tests.unit.data.made_tokenizers import make_tokenizer
from tests.unit.inference.conftest import CHATML

ROOT = Path(__file__).parents[2]
PROMPTS = ["say a", "say be, and see", "do"]


def flags_of(tiny: Tiny, **others: Any) -> dict[str, Any]:
    """A tiny job as keywords, the same as ``tiny.words`` has as words."""
    return {"load": tiny.model, "data_path": tiny.data, "lora_r": 4, **DEFAULTS, **others}


def metrics(save: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if key in ("iteration", "lm_loss", "grad_norm", "eval_loss")
        }
        for line in lines
    ]


def out_of_memory_in_a_step(flags: dict[str, Any]) -> str:
    """What a program is told where the second step's memory cannot be had."""
    import torch

    from mindspeed_lora.parallel.groups import destroy_groups
    from mindspeed_lora.training.loop import TrainingLoop

    def fails(loop: TrainingLoop) -> None:
        loop._mark("forward and backward passes", 2)
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    taken = TrainingLoop._step
    try:
        with mindspeed_lora.trainer(**flags) as trainer:
            trainer.step()
            TrainingLoop._step = fails  # type: ignore[method-assign]
            with pytest.raises(Failed) as caught:
                trainer.step()
    finally:
        TrainingLoop._step = taken  # type: ignore[method-assign]
        destroy_groups()
    return str(caught.value)


def test_out_of_memory_is_told_as_by_the_command(tiny: Tiny, workers: WorkerPool) -> None:
    (told,) = workers.run(1, out_of_memory_in_a_step, flags_of(tiny))
    assert told.startswith("out of memory in step 2, forward and backward passes: ")
    assert " are predicted for a rank, and " in told and told.endswith("; the last checkpoint is whole")
    assert "Tried to allocate" not in told


def trained_by_the_api(flags: dict[str, Any]) -> dict[str, Any]:
    """Two trainers, one after the other: the first in steps and on from there, the second at once."""
    from mindspeed_lora.parallel.groups import destroy_groups

    try:
        with mindspeed_lora.trainer(**flags) as trainer:
            first = trainer.step()
            trained = sorted(trainer.trained)
            names = [name for module in trainer.modules for name, _ in module.named_parameters()]
            folder = trainer.save()
            history = trainer.train()
            told = trainer.iteration, trainer.num_steps
            with pytest.raises(Refused, match="4 steps are done"):
                trainer.step()
            with pytest.raises(Refused, match="still open"):
                mindspeed_lora.trainer(**{**flags, "overwrite": True})
        for work in (trainer.step, trainer.evaluate, trainer.train, trainer.save):
            with pytest.raises(Refused, match="the trainer is closed"):
                work()
        again = mindspeed_lora.train(**{**flags, "save": None})
    finally:
        destroy_groups()
    return {
        "first": first.lm_loss,
        "losses": history.losses,
        "evaluations": [record.eval_loss for record in history.evaluations],
        "again": again.losses,
        "folder": folder,
        "trained": trained,
        "names": names,
        "told": told,
    }


@pytest.mark.parametrize(("world_size", "tp"), [(1, 1), (2, 2)])
def test_the_losses_are_the_commands(
    tiny: Tiny, workers: WorkerPool, tmp_path: Path, world_size: int, tp: int
) -> None:
    others = {
        "tensor_model_parallel_size": tp,
        "lora_target_modules": ("q_proj", "linear_fc2"),
        "split": "67,33,0",
        "eval_iters": 1,
        "eval_interval": 2,
    }
    words = tiny.words(**others, save=tmp_path / "command")
    assert workers.run(world_size, train, words) == [0] * world_size
    results = workers.run(world_size, trained_by_the_api, flags_of(tiny, **others, save=tmp_path / "api"))
    command = metrics(tmp_path / "command")
    losses = [line["lm_loss"] for line in command if "lm_loss" in line]
    for result in results:
        assert result["losses"] == losses
        assert result["first"] == losses[0]
        assert result["again"] == losses
        assert result["told"] == (4, 4)
        assert result["folder"] == tmp_path / "api" / "adapter"
    # The command evaluates before its first step too; the trainer had made that step already.
    assert metrics(tmp_path / "api") == [line for line in command if line["iteration"] > 0]
    assert (tmp_path / "api/iter_0000001").is_dir()
    assert (tmp_path / "api/adapter/adapter_model.safetensors").read_bytes() == (
        tmp_path / "command/adapter/adapter_model.safetensors"
    ).read_bytes()
    result = results[0]
    assert "decoder.layers.0.self_attention.linear_qkv.q_proj.lora_a" in result["trained"]
    assert any("lora_a" in name for name in result["names"])


def run_example(arguments: list[str]) -> None:
    """``examples/python_api.py`` on this rank."""
    before, sys.argv = sys.argv, ["python_api.py", *arguments]
    try:
        runpy.run_path(str(ROOT / "examples/python_api.py"), run_name="__main__")
    finally:
        sys.argv = before


def asked_by_the_api(model: Path, out: Path) -> dict[str, list[str]]:
    """Answers of the adapted model, and of the merged one after it in the same process."""
    from mindspeed_lora.parallel.groups import destroy_groups

    flags = {"max_new_tokens": 8, "micro_batch_size": 2, "hf_chat_template": True}
    answers = {}
    try:
        with mindspeed_lora.load(model, lora_load=out / "run", **flags) as adapted:
            answers["adapted"] = adapted.generate(PROMPTS)
            answers["one"] = adapted.generate(PROMPTS[2])
            with pytest.raises(Refused, match="prompt 2 has .* tokens"):
                adapted.generate(["short", "word " * 600])
        with mindspeed_lora.load(out / "merged/mg2hf", **flags) as merged:
            answers["merged"] = merged.generate(PROMPTS)
    finally:
        destroy_groups()
    return answers


def test_the_example_and_its_answers(workers: WorkerPool, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = CHATML
    model = make_model(
        "llama", tmp_path / "hf", vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=512
    )
    tokenizer.save_pretrained(model)
    rows = [
        {"instruction": f"say {word}", "input": "", "output": word * 3} for word in ("a", "be", "see", "do")
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows * 25))
    out = tmp_path / "out"
    words = [str(model), str(tmp_path / "rows.json"), "--out", str(out), "--tp", "2", "--steps", "3"]
    workers.run(2, run_example, words)
    assert [line["iteration"] for line in metrics(out / "run")] == [0, 1, 2, 3, 3]
    (answers,) = workers.run(1, asked_by_the_api, model, out)
    assert answers["adapted"] == answers["merged"]
    assert answers["one"] == answers["adapted"][2:]
    command = ["--load", str(model), "--lora-load", str(out / "run"), "--max-new-tokens", "8"]
    command += ["--hf-chat-template", "--output-file", str(tmp_path / "told.jsonl"), "--prompt", *PROMPTS]
    workers.run(1, infer_on_rank, command, str(tmp_path / "console"))
    told = [json.loads(line)["text"] for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    assert answers["adapted"] == told


def test_keywords_are_words(tiny: Tiny) -> None:
    flags = flags_of(
        tiny,
        lora_target_modules=["q_proj", "v_proj"],
        lora_rank_pattern={"v_proj": 8},
        sequence_parallel=False,
        no_shuffle=True,
        save=None,
    )
    words = tiny.words(
        lora_target_modules=("q_proj", "v_proj"), lora_rank_pattern='{"v_proj": 8}', no_shuffle=True
    )
    assert mindspeed_lora.job("posttrain", **flags) == parse("posttrain", words)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"lora_rank": 4}, "unknown flag --lora-rank; did you mean .*--lora-r"),
        ({"lora_r": "many"}, "--lora-r many: expected an integer"),
        ({"global_batch_size": 3, "micro_batch_size": 2}, "--global-batch-size 3"),
        ({"dry_run": True}, "dry_run are for the commands"),
        ({"load": {"a": 1}}, "load has keys of its own"),
    ],
)
def test_what_a_command_refuses_is_refused(tiny: Tiny, flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        mindspeed_lora.trainer(**flags_of(tiny, **flags))


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, mindspeed_lora as m; dir(m); m.job; print(sorted({'torch', 'megatron'} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert told.strip() == "[]"


def test_names() -> None:
    assert mindspeed_lora.Refused is errors.Refused
    assert mindspeed_lora.Failed is Failed is errors.Failed
    assert all(hasattr(mindspeed_lora, name) for name in mindspeed_lora.__all__)
    with pytest.raises(AttributeError, match="no attribute 'inject'"):
        mindspeed_lora.inject  # noqa: B018
