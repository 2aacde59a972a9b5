"""``tools/plan.py``: what is ranked first, what is refused, and that its command is a job."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from mindspeed_lora.config.commands import parse
from mindspeed_lora.errors import Refused
from mindspeed_lora.planning.choose import Chooser, Planned
from mindspeed_lora.planning.layouts import candidates, layouts
from mindspeed_lora.planning.main import plan_layouts
from mindspeed_lora.planning.report import command_lines, training_words
from mindspeed_lora.training.dry_run import dry_run, memory_question
from mindspeed_lora.training.memory import predict_memory
from mindspeed_lora.training.plan import plan_training
from tests.support.published_models import (
    LLAMA2_7B,
    LLAMA2_70B,
    QWEN3_30B_A3B,
    QWEN3_235B_A22B,
    write_config,
)


def job_of(folder: Path, config: dict[str, Any], gpus: int, *flags: str) -> Any:
    model = write_config(folder / "model", config)
    return parse("plan", ["--model", str(model), "--gpus", str(gpus), *flags], {})


def chosen(folder: Path, config: dict[str, Any], gpus: int, *flags: str) -> list[Planned]:
    return Chooser(job_of(folder, config, gpus, *flags)).choose()


def sizes(planned: Planned) -> tuple[int, int, int, int]:
    layout = planned.candidate.layout
    return layout.tp, layout.pp, layout.cp, layout.dp


def held(job: Any, planned: Planned) -> int:
    """What --dry-run predicts for the printed command on GPUs, the largest rank."""
    words = [*training_words(job, planned), "--dry-run", "--world-size", str(job.machine.gpus)]
    plan = plan_training(dry_job(words))
    question = memory_question(plan, job.machine.gpus, 2, on_cpu=False)
    return max(predict_memory(question, stage).total for stage in range(question.placement.pp_size))


def dry_job(words: list[str]) -> Any:
    """The job as --dry-run plans it, with data that are not there."""
    from mindspeed_lora.training.dry_run import without_missing

    return without_missing(parse("posttrain", words, {}))[0]


def test_a_small_model_on_one_node_is_replicated(tmp_path: Path) -> None:
    found = chosen(tmp_path, LLAMA2_7B, 8)
    assert sizes(found[0]) == (1, 1, 1, 8)
    assert found[0].memory < 76e9
    assert [planned.time.total for planned in found] == sorted(planned.time.total for planned in found)
    assert len({(sizes(p), p.candidate.layout.placement.vp_size) for p in found}) == len(found)


def test_a_large_model_is_cut_or_quantised(tmp_path: Path) -> None:
    cut = chosen(tmp_path, LLAMA2_70B, 2, "--seq-length", "2048", "--global-batch-size", "8")
    assert {sizes(planned)[:2] for planned in cut} <= {(2, 1), (1, 2)}
    quantised = chosen(tmp_path, LLAMA2_70B, 2, "--seq-length", "2048", "--global-batch-size", "8", "--qlora")
    assert (1, 1, 1, 2) in map(sizes, quantised)
    with pytest.raises(
        Refused, match=r"smallest needs \d+\.\d GB \(TP 1, PP 1.*recomputation full\); give --qlora"
    ):
        chosen(tmp_path, LLAMA2_70B, 1)


SMALLER = {**QWEN3_30B_A3B, "num_experts": 16, "num_hidden_layers": 8}


def test_experts_are_shared(tmp_path: Path) -> None:
    job = job_of(tmp_path, SMALLER, 8, "--global-batch-size", "64")
    chooser = Chooser(job)
    memory: dict[int, int] = {}
    for layout in layouts(job, chooser.model.shape):
        if (layout.tp, layout.pp, layout.cp) == (1, 1, 1):
            planned = chooser._planned(next(candidates(job, layout))[0])
            assert planned is not None
            memory[layout.parallel.expert_parallel_size] = planned.memory
    assert list(memory) == [1, 2, 4, 8]
    assert sorted(memory.values(), reverse=True) == list(memory.values())


def test_stages_need_not_be_even(tmp_path: Path) -> None:
    config = {**QWEN3_235B_A22B, "num_experts": 8}
    found = chosen(tmp_path, config, 16, "--global-batch-size", "32", "--qlora")
    uneven = [p for p in found if p.candidate.layout.parallel.num_layer_list is not None]
    assert uneven and all(sum(p.candidate.layout.parallel.stage_sizes) == 94 for p in uneven)


@pytest.mark.parametrize(
    ("config", "gpus", "flags"),
    [
        (LLAMA2_7B, 8, ()),
        (LLAMA2_70B, 16, ("--lora-r", "32", "--lora-target-modules", "q_proj", "v_proj")),
        (LLAMA2_70B, 2, ("--qlora", "--quant-double", "--gpu-memory", "48GB")),
        (LLAMA2_7B, 4, ("--full", "--gpu-memory", "40GB")),
        (SMALLER, 8, ("--gpu-memory", "40GB", "--seq-length", "8192")),
    ],
    ids=["7b", "70b", "70b qlora", "7b full", "experts"],
)
def test_the_command_is_a_job_of_that_memory(
    config: dict[str, Any],
    gpus: int,
    flags: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = job_of(tmp_path, config, gpus, "--global-batch-size", "32", *flags)
    found = Chooser(job).choose()
    for planned in (found[0], found[-1]):
        assert held(job, planned) == planned.memory
    words = shlex.split("\n".join(command_lines(job, found[0])).replace("\\\n", " "))
    script = words.index("posttrain_gpt.py")
    assert words[0] == "torchrun" and words[words.index("--nproc-per-node") + 1] == str(min(gpus, 8))
    again = [*words[script + 1 :], "--dry-run", "--dry-run-device", "cuda", "--world-size", str(gpus)]
    dry_run(parse("posttrain", again, {}), {})
    shown = capsys.readouterr()
    assert "dry run: everything checked, nothing written" in shown.out
    assert "holds no weights: planned from its config.json" in shown.err


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_layouts(job_of(tmp_path, LLAMA2_70B, 16, "--top", "3"))
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    heading = next(i for i, line in enumerate(lines) if "memory, GB" in line)
    assert len(lines[heading + 1].split()) >= 12 and lines[heading + 4] == ""
    assert "torchrun --nnodes 2 --nproc-per-node 8" in shown
    plan_layouts(job_of(tmp_path, LLAMA2_7B, 2, "--json"))
    told = json.loads(capsys.readouterr().out)
    assert told["layouts"][0]["command"][0] == "torchrun"
    assert told["layouts"][0]["step_seconds"] == pytest.approx(sum(told["layouts"][0]["seconds"].values()))


def test_slower_links_lead_to_fewer_cuts(tmp_path: Path) -> None:
    """70B in bf16 on two nodes: with a slow network within the node, too, stages are cheaper than cut matrices."""
    fast = chosen(tmp_path, LLAMA2_70B, 16, "--global-batch-size", "256")
    slow = chosen(
        tmp_path, LLAMA2_70B, 16, "--global-batch-size", "256", "--link-gb", "10", "--network-gb", "5"
    )
    tensor = {sizes(p): p.time.tensor for p in fast}
    assert all(p.time.tensor >= tensor[sizes(p)] for p in slow if sizes(p) in tensor)
    assert sizes(slow[0])[0] <= sizes(fast[0])[0]


def test_what_time_goes_to(tmp_path: Path) -> None:
    found = chosen(tmp_path, LLAMA2_70B, 16, "--global-batch-size", "64")
    by_layout = {(sizes(p), p.candidate.layout.placement.vp_size): p for p in found}
    plain = [p for (_, vp), p in by_layout.items() if vp == 1]
    assert all((p.time.bubble > 0) == (p.candidate.layout.pp > 1) for p in plain)
    assert all((p.time.tensor > 0) == (p.candidate.layout.tp > 1) for p in found)
    for (size, vp), planned in by_layout.items():
        same = by_layout.get((size, 1))
        if vp > 1 and same is not None and same.candidate.training == planned.candidate.training:
            assert planned.time.bubble < same.time.bubble


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "8"], "--model is missing"),
        (["--model", "/none"], "--gpus is missing"),
        (["--model", "/none", "--gpus", "12"], "--gpus 12 is no multiple of --gpus-per-node 8"),
        (["--model", "/none", "--gpus", "8", "--full", "--qlora"], "--full trains all"),
        (["--model", "/none", "--gpus", "8", "--gpu-memory", "much"], "--gpu-memory much: expected a size"),
        (["--model", "/none", "--gpus", "8", "--gpu-memory", "80"], "--gpu-memory 80: expected a size with"),
    ],
)
def test_what_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(Refused, match=message):
        parse("plan", flags, {})


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no config.json there"):
        Chooser(parse("plan", ["--model", str(tmp_path), "--gpus", "8"], {}))


@pytest.mark.parametrize(("gpus", "rows"), [(7, 133), (16, 128), (512, 512)])
def test_the_batch_that_is_left_out_fits_the_gpus(tmp_path: Path, gpus: int, rows: int) -> None:
    job = job_of(tmp_path, LLAMA2_7B, gpus)
    assert job.plan.global_batch_size == rows
    assert any(f"--global-batch-size {rows}" in text for text in job.notices) == (rows != 128)
    assert job_of(tmp_path, LLAMA2_7B, gpus, "--global-batch-size", "128").plan.global_batch_size == 128
