"""``--dry-run``: what it prints, what it does without, and that it writes nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mindspeed_lora.config.commands import parse
from mindspeed_lora.errors import Refused
from mindspeed_lora.training.dry_run import dry_run, memory_question
from mindspeed_lora.training.plan import plan_training
from mindspeed_lora.training.planned_files import checkpoint_parts, planned_files, saved_iterations
from tests.support.published_models import QWEN3_235B_A22B, write_config
from tests.support.tiny import Tiny

SHAPE = [
    *("--num-layers", "32", "--hidden-size", "4096", "--num-attention-heads", "32"),
    *("--ffn-hidden-size", "11008", "--max-position-embeddings", "4096", "--padded-vocab-size", "32000"),
    "--untie-embeddings-and-output-weights",
]


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    dry_run(parse("posttrain", [*words, "--dry-run"], {}), {})
    shown = capsys.readouterr()
    return shown.out, shown.err


def figures(out: str, part: str) -> list[int]:
    table = out.partition("memory of a rank")[2]
    (line,) = [line for line in table.splitlines() if line.strip().startswith(f"{part} ")]
    return [int(number.replace(",", "")) for number in re.findall(r"[\d,]+", line.partition("|")[2])]


def test_a_job_that_is_whole(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = told(tiny.words(pipeline_model_parallel_size=2, save=tmp_path / "run"), capsys)
    assert "dry run: everything checked, nothing written" in out
    assert re.search(r"world size +\| 2 ", out)
    assert len(figures(out, "parameters")) == 2
    total = figures(out, "total")
    parts = (
        "weights",
        "adapters",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "buffers",
        "heap",
        "process",
    )
    for stage in range(2):
        assert sum(figures(out, part)[stage] for part in parts) == pytest.approx(total[stage], abs=len(parts))
    assert not (tmp_path / "run").exists()


def test_nothing_that_the_flags_name_has_to_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--load",
        "/nowhere",
        "--data-path",
        "your data path",
        "--tokenizer-name-or-path",
        "/none",
        *SHAPE,
    ]
    words += ["--lora-r", "16", "--train-iters", "3", "--seq-length", "4096", "--bf16", "--world-size", "16"]
    out, err = told([*words, "--tensor-model-parallel-size", "8", "--sequence-parallel"], capsys)
    for path in ("--load /nowhere", "--data-path your data path", "/none"):
        assert f"{path} is not there" in err
    norms = 65 * 4096
    # Per layer r · (A + B): of linear_qkv and linear_fc1 B is cut by 8, of linear_proj and linear_fc2 A.
    factors = 32 * 16 * (4 * 4096 + (3 * 4096 + 4096 + 2 * 11008 + 11008) // 8)
    assert figures(out, "trained") == [factors]
    assert figures(out, "parameters") == [(6_738_415_616 - norms) // 8 + norms + factors]


def test_an_adapter_that_is_not_there_is_assumed(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = told(tiny.words(lora_load="/none", lora_r=None), capsys)
    assert "an adapter of rank 16 is assumed" in err
    assert "r 16, alpha 32" in out


def test_paged_state_is_told_beside_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--load", "/nowhere", "--data-path", "/none", *SHAPE, "--train-iters", "3", "--world-size", "1"]
    plain, _ = told(words, capsys)
    paged, _ = told([*words, "--paged-optimizer", "--paged-optimizer-dir", "/nowhere"], capsys)
    assert "paged" not in plain
    assert figures(paged, "paged, in a file") == figures(plain, "optimizer")
    assert figures(paged, "optimizer") == [32]
    less = figures(plain, "optimizer")[0] - 32
    # The process is another size each time that it is asked.
    assert figures(paged, "total")[0] == pytest.approx(figures(plain, "total")[0] - less, abs=50)


def test_without_weights_or_shape_it_is_refused(tiny: Tiny) -> None:
    with pytest.raises(Refused, match="--load /nowhere is not there.*--num-layers, --hidden-size"):
        dry_run(parse("posttrain", [*tiny.words(load="/nowhere"), "--dry-run"], {}), {})


def test_what_cannot_be_is_refused(tiny: Tiny) -> None:
    with pytest.raises(Refused, match="--num-layer-list"):
        words = tiny.words(pipeline_model_parallel_size=2, num_layer_list="1,9", global_batch_size=4)
        dry_run(parse("posttrain", [*words, "--dry-run"], {}), {})


def test_a_cluster_of_experts_is_planned_on_a_laptop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """512 GPUs: quantised experts over ranks, rows cut, stages in virtual ones, no file there but a configuration."""
    model = write_config(tmp_path / "model", {**QWEN3_235B_A22B, "num_experts": 16})
    words = ["--load", str(model), "--data-path", "your data path", "--save", str(tmp_path / "run"), "--bf16"]
    words += ["--world-size", "512", "--tensor-model-parallel-size", "4", "--sequence-parallel"]
    words += ["--pipeline-model-parallel-size", "8", "--num-virtual-stages-per-pipeline-rank", "3"]
    words += ["--noop-layers", "94,95", "--context-parallel-size", "2", "--expert-model-parallel-size", "8"]
    words += ["--expert-tensor-parallel-size", "1", "--use-distributed-optimizer", "--qlora"]
    words += ["--seq-length", "32768", "--global-batch-size", "128", "--train-iters", "1000"]
    words += ["--save-interval", "400", "--save-total-limit", "2", "--recompute-granularity", "full"]
    out, err = told([*words, "--dry-run-device", "cuda"], capsys)
    assert "holds no weights: planned from its config.json" in err
    assert re.search(r"data parallel +\| 8$", out, re.MULTILINE) and "512 (cuda)" in out
    assert "process" not in out and figures(out, "heap") == [0] * 8
    assert len(figures(out, "quantised")) == 8 and max(figures(out, "total")) < 80_000
    assert "iter_0000800 … iter_0001000: 2 checkpoints" in out and "1 older ones are removed" in out
    assert "random/ (512 files)" in out and not (tmp_path / "run").exists()
    on_cpu, _ = told(words, capsys)
    assert figures(on_cpu, "heap")[0] > 0


def test_sizes_of_what_would_be_written(tiny: Tiny, tmp_path: Path) -> None:
    words = tiny.words(save=tmp_path / "run", train_iters=5, save_interval=2)
    plan = plan_training(parse("posttrain", [*words, "--dry-run"], {}))
    assert saved_iterations(plan.job, 0, 5) == [2, 4, 5]
    assert saved_iterations(plan.job, 3, 5) == [4, 5]
    parts = checkpoint_parts(plan, 1, memory_question(plan, 1, 4))
    assert plan.adapter is not None
    trained = sum(rows * columns for rows, columns in plan.adapter.spec.tensors.values())
    # In the file q, k and v, and gate and up, have the A that they share once each.
    shared = sum(
        (len(part.hf_modules) - 1) * part.rank * part.in_features for part in plan.adapter.spec.parts
    )
    assert shared > 0
    assert (parts["adapter/"], parts["optimizer/"]) == (4 * (trained + shared), 12 * trained)
    cut = plan_training(parse("posttrain", [*words, "--dry-run", "--tensor-model-parallel-size", "2"], {}))
    uncut = sum(
        part.rank * (part.out_features if part.linear in ("linear_proj", "linear_fc2") else part.in_features)
        for part in plan.adapter.spec.parts
    )
    assert checkpoint_parts(cut, 2, memory_question(cut, 2, 4))["optimizer/"] == 12 * (trained + uncut)
    whole = tiny.words(lora_r=None, save=tmp_path / "run", no_save_optim=True, no_save_rng=True)
    full = plan_training(parse("posttrain", [*whole, "--dry-run"], {}))
    size = sum(file.stat().st_size for file in tiny.model.glob("*.safetensors"))
    question = memory_question(full, 1, 4)
    assert checkpoint_parts(full, 1, question) == {"mp_rank_00/": pytest.approx(size, rel=0.05)}
    assert planned_files(full, 1, question)[0] == f"would write {tmp_path / 'run'}/"
