from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from mindspeed_lora.config.commands import COMMANDS, parse
from mindspeed_lora.config.config_file import to_yaml
from mindspeed_lora.config.flags import Section
from mindspeed_lora.config.jobs import Job
from mindspeed_lora.errors import Refused

LINES = {
    "posttrain": "--data-path p --lora-r 8 --lora-target-modules linear_qkv --bf16 --split 9,1 --save s",
    "pretrain": "--data-path p --train-iters 4 --lr 3e-4 --lr-warmup-iters 2",
    "convert": "--load-dir a --save-dir b --save-model-type mg --target-tensor-parallel-size 2",
    "inspect": "folder --tensors",
    "verify": "one other --tolerance 1e-3 --json",
    "preprocess": "--input i --output-prefix o --tokenizer-model t --json-keys text title",
    "inference": "--load m --prompt hello",
    "evaluation": "--load m --task mmlu --task-data-path d --max-eval-samples 3",
    "plan": "--model m --gpus 16 --gpu-memory 40GB --lora-r 8 --qlora",
}


def read(command: str, path: Path, *argv: str) -> Job:
    job: Job = parse(command, ["--config", str(path), *argv], {})
    return job


def sections(job: Job) -> list[Section]:
    return [
        value
        for field in dataclasses.fields(job)
        if isinstance(value := getattr(job, field.name), Section) and field.name != "runtime"
    ]


def test_what_is_printed_is_covered_here() -> None:
    assert LINES.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", LINES)
def test_what_is_printed_can_be_read_again(command: str, tmp_path: Path) -> None:
    job = parse(command, LINES[command].split(), {})
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(job))
    assert sections(read(command, path)) == sections(job)


def test_a_run_without_an_adapter_is_read_as_one(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(parse("posttrain", ["--data-path", "p"], {})))
    assert not read("posttrain", path).lora.enabled  # type: ignore[attr-defined]


def test_the_printed_configuration_is_resolved() -> None:
    printed = yaml.safe_load(to_yaml(parse("posttrain", ["--data-path", "p", "--lora-r", "4"], {})))
    assert printed["lora-alpha"] == 8
    assert printed["epochs"] == 3.0
    assert printed["load"] is None


def test_patterns_are_objects(tmp_path: Path) -> None:
    words = ["--data-path", "p", "--lora-rank-pattern", '{"q_proj": 4, "layers.0.*": 2}']
    words += ["--lora-alpha-pattern", '{"q_proj": 0.5}', "--lora-layers-to-transform", "0", "3"]
    job = parse("posttrain", words, {})
    assert job.lora.lora_rank_pattern == {"q_proj": 4, "layers.0.*": 2}
    (tmp_path / "run.yaml").write_text(to_yaml(job))
    assert read("posttrain", tmp_path / "run.yaml").lora == job.lora  # type: ignore[attr-defined]


def test_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "lora-r: 8\nlr: 1e-3\nbf16: true\nfinetune: false\nload: null\ndata_path: rows\n"
        "lora-target-modules: [linear_qkv, linear_proj]\nuse-flash-attn: true\n"
    )
    for argv in (["--lora-r", "4"], ["--lora-r=4"]):
        job = read("posttrain", path, *argv)
        assert job.lora.lora_r == 4  # type: ignore[attr-defined]
        assert job.lora.lora_target_modules == ("linear_qkv", "linear_proj")  # type: ignore[attr-defined]
        assert job.training.lr == 1e-3 and job.training.bf16  # type: ignore[attr-defined]
        assert job.data.data_path == ("rows",)  # type: ignore[attr-defined]
        assert job.notices[0] == "no effect here: --use-flash-attn"
        assert "finetune" not in job.given


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora-rank: 3", "or --lora-r?"),
        ("- lora-r", "expected flags as keys"),
        ("lora-r: [", "is not YAML"),
        ("lora: {r: 3}", "unknown flag --lora"),
        ("lora-r: {r: 3}", "lora-r has keys of its own"),
        ("lora-r: x", "--lora-r x: expected an integer"),
        ("use-dora: true", "only plain LoRA"),
        ("config: other.yaml", "cannot name another"),
        ("bf16: 3", "--bf16 is a switch"),
        ("lora-r: 8\nlr: 1\nlora-r: 4", "lora-r is there twice"),
    ],
)
def test_what_a_file_may_not_hold(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(Refused) as error:
        read("posttrain", path)
    assert message in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="No such file"):
        read("posttrain", tmp_path / "none.yaml")


def test_what_a_file_repeats_of_the_defaults_is_not_given(tmp_path: Path) -> None:
    """A printed configuration has every field, and some flags mean more where they are asked for."""
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(parse("inference", ["--load", "m", "--top-k", "7"], {})))
    job = read("inference", path)
    assert "max_new_tokens" not in job.given and {"load", "top_k"} <= job.given
    assert "max_new_tokens" in read("inference", path, "--max-new-tokens", "128").given


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lora-r: many", "--lora-r many: expected an integer"),
        ("bf16: 3", "--bf16 is a switch and takes no value, but got '3'"),
        ("lora-r: [1, 2]", "--lora-r takes one value, not 2"),
        ("lr: true", "--lr needs a value"),
        ("lr: .nan", "--lr nan: expected a finite number"),
        ("lora-target-modules: [q_proj, null]", "--lora-target-modules holds null; expected texts"),
        ("lora-target-modules: [[q_proj]]", "--lora-target-modules holds a list; expected texts"),
        ("lora-target-modules: &a [*a]", "--lora-target-modules holds a list; expected texts"),
        ("lora-r: {a: 1}", "lora-r has keys of its own"),
        ("micro-batch-size: 0", "--micro-batch-size 0: expected an integer of at least 1"),
        ("mtp-num-layers: 1", "--mtp-num-layers 1: multi-token prediction is not supported"),
    ],
)
def test_a_wrong_value_names_the_file(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data-path: rows\n{line}\n")
    with pytest.raises(Refused) as caught:
        read("posttrain", path)
    assert str(caught.value).startswith(f"--config {path}: {message}")


@pytest.mark.parametrize("said", ["true", "false"])
def test_a_flag_with_the_values_true_and_false(said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data-path: rows\nenable-thinking: {said}\n")
    assert read("posttrain", path).tokenizer.enable_thinking == said


def test_an_object_may_be_written_as_one(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("input: rows\nmap-keys:\n  prompt: q\n  tags: {role_tag: role}\n")
    given = read("preprocess", path, "--print-config").preprocess.map_keys
    assert json.loads(given) == {"prompt": "q", "tags": {"role_tag": "role"}}


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"lora-r: \xff\n")
    with pytest.raises(Refused, match="is not YAML"):
        read("posttrain", path)
    path.write_bytes("data-path: rows\nlora-r: 4\n".encode("utf-16"))
    assert read("posttrain", path).lora.lora_r == 4
