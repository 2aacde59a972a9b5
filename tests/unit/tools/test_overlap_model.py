"""The analytic model: its limits, and that it reads what the benchmark writes."""

from __future__ import annotations

import math

import overlap_model
import pytest
from overlap_model import MODELS, Job, choose, predict, predict_interleaved

from mindspeed_lora.adapters.schedules import Family, SchedulePlan
from mindspeed_lora.adapters.schedules.cost import Device
from mindspeed_lora.adapters.schedules.plan import UNFUSED

JOB = Job(MODELS["llama-2-7b"], tokens=4096, row=4096, tp=8)
FAST = Device(6e14, math.inf, math.inf, 0.0)
SLOW = Device(6e14, 2.6e12, 1e10, 1e-5)
WHOLE = SchedulePlan(Family.ONE_COLLECTIVE)


def test_without_wire_time_only_the_compute_is_left() -> None:
    found = predict(JOB, FAST, [WHOLE] * 4, other=0.0)
    assert found.communication == 0.0
    # 4 · parameters · tokens operations, the side branch besides.
    parameters = 4 * 4096**2 + 3 * 4096 * 11008
    assert found.step * 8 * FAST.flops == pytest.approx(4 * parameters * JOB.tokens, rel=0.1)


def test_hiding_never_beats_the_bound() -> None:
    unfused = predict(JOB, SLOW, [UNFUSED] * 4, other=1e-3)
    fused = predict(JOB, SLOW, choose(JOB, SLOW, None, None, None), other=1e-3)
    halves = predict_interleaved(JOB, SLOW, other=1e-3)
    assert halves.communication <= halves.step < unfused.step
    assert fused.communication <= fused.step < unfused.step
    assert fused.communication < unfused.communication


def test_the_table_and_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert overlap_model.main(["--table"]) == 0
    assert "8 × H100, NVLink, TP 8: packed, 4096 tokens" in capsys.readouterr().out
    assert overlap_model.main(["--model", "llama-2-70b", "--tp", "8", "--link-gb", "50"]) == 0
    told = capsys.readouterr().out
    assert "llama-2-70b" in told and "linear_fc2: one-collective" in told


def test_validation_compares_every_rate() -> None:
    sizes = {"hidden_size": 256, "ffn_hidden_size": 688, "heads": 2, "layers": 1, "seq_length": 64}
    ways = ("unfused", "no chunks", "fused", "published, merge", "interleaved")
    rate = {
        "ratio": 1.0,
        "compute_seconds": 0.02,
        "communication_seconds": 0.02,
        "speeds": {"flops": 1e11, "memory": 1e11, "link": 1e8, "latency": 1e-4},
        "step_seconds": {way: [0.03, 0.04, 0.05] for way in ways},
    }
    found = {
        "sizes": {**sizes, "micro_batch_size": 2, "rank": 16},
        "ranks": 2,
        "bytes_sent": 2_000_000,
        "rates": [rate, {**rate, "ratio": None}],
    }
    text = overlap_model.validation(found)
    assert text.count("0.040") == len(ways)
    assert "error:" in text
