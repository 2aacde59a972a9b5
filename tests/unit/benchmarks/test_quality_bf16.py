"""Held-out losses of two trainings, on a tiny model on the CPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import quality_bf16
import torch

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")


@needs_trl
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_steps(model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    words = ["--device", "cpu", "--model", model, "--data", data, "--held-out", "4", "--threads", "1"]
    status = quality_bf16.main([*words, "--steps", "2", "--seeds", "1", "--json", str(out)])
    assert status == 0, capsys.readouterr().err
    report = json.loads(out.read_text())
    (result,) = report["results"]
    assert report["within"] and len(result["train_losses"]["ours"]) == 2
    # Both went on from the same adapter, and from it to almost the same place.
    assert result["ours"] != result["start"]
    assert result["ours"] == pytest.approx(result["peft"], rel=1e-3)


def test_rows_must_be_left(model: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--model", model, "--data", data, "--held-out", "20"]
    assert quality_bf16.main(words) == 2
    assert "--held-out 20: the file has 20 rows" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert quality_bf16.main([]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
