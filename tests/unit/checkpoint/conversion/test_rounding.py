"""Counting what float16 does not hold."""

from __future__ import annotations

import torch

from mindspeed_lora.checkpoint.conversion.rounding import Losses, LossReport, losses


def test_every_kind_of_loss_is_counted():
    values = torch.tensor(
        [0.0, 1.0, 65504.0, 65520.0, -1e9, float("inf"), float("nan"), 1e-9, -1e-9, 3e-6, 1e-4]
    )
    assert losses(values, values.half()) == Losses(infinite=2, zero=2, subnormal=1)
    wide = values.repeat(300_000)
    assert losses(wide, wide.half()) == Losses(infinite=600_000, zero=600_000, subnormal=300_000)
    # In bfloat16, 65504 is 65536 already.
    assert losses(values.bfloat16(), values.bfloat16().half()).infinite == 3
    assert losses(values, values.bfloat16()) == Losses()
    assert losses(values.half(), values.half()) == Losses()


def test_the_report_counts_a_slice_once_and_names_the_worst():
    report = LossReport()
    assert report.sentence() is None
    report.note("a", "top", Losses(infinite=3))
    report.note("a", "bottom", Losses(infinite=1, zero=2))
    report.note("a", "top", Losses(infinite=3))
    report.note("b", "all", Losses(infinite=9))
    report.note("c", "all", Losses())
    assert report.of("infinite") == {"a": 4, "b": 9}
    assert report.sentence() == (
        "float16 does not hold every value: 13 values in 2 tensors are beyond ±65504 and became infinite "
        "(most in b: 9); 2 values in 1 tensors became zero (most in a: 2)"
    )
