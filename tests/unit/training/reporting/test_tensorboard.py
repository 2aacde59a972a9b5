from __future__ import annotations

import resource
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mindspeed_lora.training.reporting import EvaluationRecord
from mindspeed_lora.training.reporting.tensorboard import TensorboardEvents
from tests.unit.training.reporting.records import step_record


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars as tensorboard shows them, with purged steps left out."""
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def fail(text: str) -> None:
    raise AssertionError(text)


def train(folder: Path, resumed: int, last: int, loss: float) -> None:
    events = TensorboardEvents(folder, resumed, 8, fail)
    for iteration in range(resumed + 1, last + 1):
        events.step(step_record(iteration, lm_loss=loss))
    events.close()


def test_tags_are_megatrons(tmp_path: Path) -> None:
    events = TensorboardEvents(tmp_path, 0, 8, fail)
    events.step(step_record(1, lm_loss=2.5, loss_scale=4.0))
    events.evaluation(EvaluationRecord(1, 2.0, 10))
    events.close()
    found = scalars(tmp_path)
    assert found["lm loss"] == [(1, 2.5)]
    assert found["lm loss vs samples"] == [(8, 2.5)]
    assert found["lm loss validation"] == [(1, 2.0)]
    assert found["lm loss validation vs samples"] == [(8, 2.0)]
    assert found["loss-scale"] == [(1, 4.0)]
    assert found["iteration-time"] == [(1, 0.25)]
    assert {"learning-rate", "grad-norm", "batch-size", "learning-rate vs samples"} <= set(found)


def test_steps_that_are_done_again_are_hidden(tmp_path: Path) -> None:
    train(tmp_path, 0, 7, loss=1.0)
    train(tmp_path, 4, 6, loss=2.0)
    found = scalars(tmp_path)
    assert found["lm loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0)]


def test_evaluation_at_the_resumed_step_stays(tmp_path: Path) -> None:
    events = TensorboardEvents(tmp_path, 0, 8, fail)
    events.evaluation(EvaluationRecord(4, 3.0, 10))
    events.close()
    train(tmp_path, 4, 5, loss=2.0)
    assert scalars(tmp_path)["lm loss validation"] == [(4, 3.0)]


def test_a_fresh_run_hides_an_older_one(tmp_path: Path) -> None:
    train(tmp_path, 0, 5, loss=1.0)
    train(tmp_path, 0, 2, loss=2.0)
    assert scalars(tmp_path)["lm loss"] == [(1, 2.0), (2, 2.0)]


def test_a_skipped_step_has_no_loss(tmp_path: Path) -> None:
    events = TensorboardEvents(tmp_path, 0, 8, fail)
    events.step(step_record(1, skipped=True))
    events.close()
    assert "lm loss" not in scalars(tmp_path)


def test_a_folder_that_cannot_be_made_is_one_notice(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    notices: list[str] = []
    events = TensorboardEvents(tmp_path / "file", 0, 8, notices.append)
    for iteration in range(1, 4):
        events.step(step_record(iteration))
    events.evaluation(EvaluationRecord(3, 2.0, 10))
    events.close()
    assert len(notices) == 1
    assert "no more tensorboard events" in notices[0]


def test_a_full_disk_is_one_notice_and_what_was_written_stays(tmp_path: Path) -> None:
    notices: list[str] = []
    events = TensorboardEvents(tmp_path, 0, 8, notices.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        for iteration in range(1, 50):
            events.step(step_record(iteration, lm_loss=1.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    events.close()
    assert len(notices) == 1
    assert "File too large" in notices[0]
    assert scalars(tmp_path)["lm loss"][:2] == [(1, 1.0), (2, 1.0)]


def test_events_are_there_while_the_run_goes(tmp_path: Path) -> None:
    events = TensorboardEvents(tmp_path, 0, 8, fail)
    events.step(step_record(1, lm_loss=2.5))
    assert scalars(tmp_path)["lm loss"] == [(1, 2.5)]
    events.close()
