from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from mindspeed_lora.training.reporting.plot import draw_loss, loss_curves, moving_average


def metrics_file(folder: Path, *records: dict[str, object]) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_curves_leave_out_what_is_no_loss() -> None:
    training, evaluation = loss_curves(
        [
            {"iteration": 0, "eval_loss": 4.0, "eval_tokens": 3},
            {"iteration": 1, "lm_loss": 3.0},
            {"iteration": 2, "lm_loss": 9.0, "skipped": True},
            {"iteration": 3, "lm_loss": None},
            {"iteration": 4, "lm_loss": 2.0},
            {"iteration": 4, "eval_loss": None, "eval_tokens": 0},
        ]
    )
    assert training == {1: 3.0, 4: 2.0}
    assert evaluation == {0: 4.0}


def test_moving_average_begins_with_what_there_is() -> None:
    assert moving_average([4.0, 2.0, 0.0, 6.0], 2) == pytest.approx([4.0, 3.0, 1.0, 3.0])


@pytest.mark.parametrize("steps", [1, 20, 300])
def test_a_picture_is_drawn_beside_the_metrics(tmp_path: Path, steps: int) -> None:
    records = [{"iteration": i, "lm_loss": 2.0 + 1 / i} for i in range(1, steps + 1)]
    path = draw_loss(metrics_file(tmp_path, *records, {"iteration": steps, "eval_loss": 2.2}))
    assert path == tmp_path / "loss.png"
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (1200, 750)
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "metrics.jsonl"]


def test_evaluation_alone_can_be_drawn(tmp_path: Path) -> None:
    assert draw_loss(metrics_file(tmp_path, {"iteration": 0, "eval_loss": 2.0})) is not None


def test_nothing_is_drawn_without_a_loss(tmp_path: Path) -> None:
    assert draw_loss(metrics_file(tmp_path)) is None
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
