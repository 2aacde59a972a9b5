from __future__ import annotations

import math
import re
from datetime import datetime

from mindspeed_lora.training.reporting import EvaluationRecord
from mindspeed_lora.training.reporting.iteration_line import evaluation_lines, iteration_line
from tests.unit.training.reporting.records import step_record

MOMENT = datetime(2026, 11, 21, 12, 0, 0)


def fields(line: str) -> dict[str, str]:
    """What a script sees that splits the line as people's do."""
    pairs = (part.split(":", 1) for part in line.split("]", 1)[1].split("|") if ":" in part)
    return {name.strip(): value.strip() for name, value in pairs}


def test_megatrons_line_to_the_letter() -> None:
    record = step_record(lm_loss=2.345678, elapsed_ms=123.44, consumed_samples=8)
    expected = (
        " [2026-11-21 12:00:00] iteration        1/     100 | consumed samples:            8 |"
        " elapsed time per iteration (ms): 123.4 | learning rate: 1.000000E-04 | global batch size:     8 |"
        " lm loss: 2.345678E+00 | loss scale: 1.0 | grad norm: 1.234 |"
        " number of skipped iterations:   0 | number of nan iterations:   0 |"
    )
    line = iteration_line([record], 100, 8, MOMENT)
    assert line.startswith(expected)
    assert line.removeprefix(expected) == " tokens per second: 8101.1 | peak memory (GiB): 1.50 |"


def test_throughput_stands_where_megatron_has_it() -> None:
    line = iteration_line([step_record()], 100, 8, MOMENT, tflops_per_gpu=12.345)
    assert "(ms): 250.0 | throughput per GPU (TFLOP/s/GPU): 12.3 | learning rate: " in line


def test_loss_and_time_are_means_of_the_interval() -> None:
    steps = [
        step_record(4, lm_loss=1.0, elapsed_ms=100.0, peak_memory_bytes=2**30),
        step_record(5, lm_loss=4.0, elapsed_ms=200.0, peak_memory_bytes=2**31),
        step_record(6, lm_loss=2.5, elapsed_ms=300.0, peak_memory_bytes=2**30, grad_norm=7.0),
    ]
    found = fields(iteration_line(steps, 10, 8, MOMENT))
    assert float(found["lm loss"]) == 2.5
    assert float(found["elapsed time per iteration (ms)"]) == 200.0
    assert float(found["grad norm"]) == 7.0
    assert float(found["tokens per second"]) == 5000.0
    assert float(found["peak memory (GiB)"]) == 2.0
    assert found["consumed samples"] == "48"


def test_skipped_steps_are_counted_and_left_out_of_the_loss() -> None:
    steps = [step_record(1, lm_loss=1.0), step_record(2, lm_loss=9.0, skipped=True)]
    found = fields(iteration_line(steps, 10, 8, MOMENT))
    assert float(found["lm loss"]) == 1.0
    assert found["number of skipped iterations"] == "1"
    assert found["number of nan iterations"] == "0"


def test_no_loss_is_shown_when_every_step_was_skipped() -> None:
    steps = [step_record(1, lm_loss=math.nan, skipped=True)]
    line = iteration_line(steps, 10, 8, MOMENT)
    assert "lm loss" not in line
    assert fields(line)["number of nan iterations"] == "1"


def test_large_numbers_widen_their_field_only() -> None:
    record = step_record(123456789, consumed_samples=10**13, loss_scale=2.0**32)
    line = iteration_line([record], 10**9, 131072, MOMENT)
    match = re.search(r"iteration\s+(\d+)/\s*(\d+) \| consumed samples:\s+(\d+) \|", line)
    assert match is not None and match.groups() == ("123456789", "1000000000", "10000000000000")
    assert fields(line)["loss scale"] == "4294967296.0"


def test_evaluation_is_framed_as_in_megatron() -> None:
    frame, line, last = evaluation_lines(EvaluationRecord(40, math.log(10.0), 99))
    assert line == (
        " validation loss at iteration 40 | lm loss value: 2.302585E+00 | lm loss PPL: 1.000000E+01 | "
    )
    assert frame == last == "-" * (len(line) + 1)


def test_perplexity_does_not_overflow() -> None:
    assert "PPL: 4.851652E+08" in evaluation_lines(EvaluationRecord(1, 1e6, 1))[1]
