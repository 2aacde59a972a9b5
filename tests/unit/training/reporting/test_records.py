from __future__ import annotations

import json
import math

import pytest

from mindspeed_lora.training.reporting import EvaluationRecord
from tests.unit.training.reporting.records import step_record

KEYS = [
    "iteration",
    "lm_loss",
    "grad_norm",
    "learning_rate",
    "tokens",
    "loss_tokens",
    "tokens_per_second",
    "elapsed_ms",
    "peak_memory_bytes",
]


def test_a_step_has_exactly_the_promised_keys() -> None:
    assert list(step_record().metrics()) == KEYS


def test_floats_keep_their_full_precision() -> None:
    loss = 0.1 + 0.2
    line = json.dumps(step_record(lm_loss=loss, elapsed_ms=1 / 3).metrics())
    assert json.loads(line)["lm_loss"] == loss
    assert json.loads(line)["elapsed_ms"] == 1 / 3


def test_rate_is_of_this_step() -> None:
    assert step_record(tokens=1000, elapsed_ms=250.0).tokens_per_second == 4000.0
    assert step_record(elapsed_ms=0.0).tokens_per_second == 0.0


def test_a_skipped_step_says_so() -> None:
    assert step_record(skipped=True).metrics()["skipped"] is True


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_has_no_word_for_is_null(value: float) -> None:
    assert step_record(grad_norm=value).metrics()["grad_norm"] is None
    assert EvaluationRecord(3, value, 10).metrics()["eval_loss"] is None


def test_an_evaluation_has_exactly_the_promised_keys() -> None:
    assert EvaluationRecord(3, 2.5, 10).metrics() == {"iteration": 3, "eval_loss": 2.5, "eval_tokens": 10}
