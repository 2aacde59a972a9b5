"""The benchmark of a GPU, run on the CPU at a tiny shape: all of it but the device. No figure is judged."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import train_vs_trl_gpu
from comparison.process import run_child
from comparison.shapes import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM

HAS_TRL = importlib.util.find_spec("trl") is not None
PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3-8b": 8_030_261_248,
    "qwen3-8b": 8_190_735_360,
    # 30,532,122,624 of all 48 layers.
    "qwen3-30b-a3b": 30_532_122_624 - 44 * 623_120_640,
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_of_it_at_a_tiny_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    status = train_vs_trl_gpu.main(
        [
            *("--device", "cpu", "--shape", "tiny", "tiny-moe", "--seq-length", "512", "--rows-a-step", "2"),
            *("--steps", "2", "--warmup", "1", "--repeats", "1", "--threads", "1", "--json", str(out)),
            *([] if HAS_TRL else ["--alone"]),
        ]
    )
    assert status == 0, capsys.readouterr().err
    report = json.loads(out.read_text())
    assert [result["rows"] for result in report["results"]] == ["demo", "full"] * 2
    assert [result["shape"] for result in report["results"]] == ["tiny"] * 2 + ["tiny-moe"] * 2
    assert {"machine", "versions", "commit", "command"} <= set(report)
    for result in report["results"]:
        assert result["first_losses_agree"]
        assert result["share_of_predicted_time"] > 0
        assert result["predicted"]["products_ms"] > 0 and result["predicted"]["attention_ms"] > 0
        assert len(result["sides"]) == 1 + HAS_TRL
        for side in result["sides"]:
            assert side["tflop_per_second"] > 0 and side["share_of_peak"] > 0
            assert 0 < side["share_of_bandwidth"] < 1
    if HAS_TRL:
        for full in report["results"][1::2]:
            ours, theirs = full["sides"]
            assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-3)


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_shapes_are_the_published_ones(name: str) -> None:
    model_type, fields = SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_without_a_device_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert train_vs_trl_gpu.main([]) == 2
    assert "--device cuda: torch sees no CUDA device" in capsys.readouterr().err


def test_children_see_the_device_only_where_it_is_meant(tmp_path: Path) -> None:
    show = ["-c", "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"]
    for cuda in (True, False):
        setting = train_vs_trl_gpu.Setting(model="m", data="d", cuda=cuda)
        run_child(show, 1, tmp_path / "log", setting.environment)
        assert (eval((tmp_path / "log").read_text()) == "") == (not cuda)
