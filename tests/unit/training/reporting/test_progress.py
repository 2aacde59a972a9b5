from __future__ import annotations

import pytest

from mindspeed_lora.training.reporting.progress import Progress, clock_time
from tests.unit.training.reporting.records import step_record


def test_estimate_counts_what_lies_between_the_steps() -> None:
    progress = Progress(10, is_terminal=False, now=100.0)
    progress.step(step_record(1, elapsed_ms=2000.0), 102.0)
    assert progress.remaining_seconds() == pytest.approx(9 * 2.0)
    # The second step took two seconds as well, but a save of four lay before it.
    progress.step(step_record(2, elapsed_ms=2000.0), 108.0)
    assert progress.remaining_seconds() == pytest.approx(8 * 4.0)


def test_estimate_of_a_resumed_run_knows_only_its_own_steps() -> None:
    progress = Progress(10, is_terminal=False, now=0.0)
    progress.step(step_record(6, elapsed_ms=1000.0), 30.0)
    assert progress.remaining_seconds() == pytest.approx(4.0)


def test_estimate_forgets_slow_beginnings() -> None:
    progress = Progress(1000, is_terminal=False, now=0.0)
    now = 0.0
    for iteration in range(1, 101):
        seconds = 10.0 if iteration == 1 else 1.0
        now += seconds
        progress.step(step_record(iteration, elapsed_ms=1000 * seconds), now)
    assert progress.remaining_seconds() == pytest.approx(900.0)


def test_nothing_is_left_at_the_end() -> None:
    progress = Progress(2, is_terminal=False, now=0.0)
    progress.step(step_record(2), 1.0)
    assert "2/2 100% | ETA 0:00:00" in progress.text(1.0)


def test_off_a_terminal_ten_seconds_lie_between_lines() -> None:
    progress = Progress(100, is_terminal=False, now=0.0)
    shown = []
    for second in range(1, 41):
        progress.step(step_record(second), float(second))
        if progress.due(float(second)):
            shown.append(second)
    assert shown == [10, 20, 30, 40]


def test_on_a_terminal_the_last_step_is_always_drawn() -> None:
    progress = Progress(3, is_terminal=True, now=0.0)
    progress.step(step_record(2), 0.2)
    assert progress.due(0.2)
    progress.step(step_record(3), 0.21)
    assert progress.due(0.21)


def test_text_off_a_terminal() -> None:
    progress = Progress(100, is_terminal=False, now=0.0)
    progress.step(step_record(25, lm_loss=2.5, elapsed_ms=1000.0), 60.0)
    assert progress.text(60.0) == (
        " progress 25/100  25% | ETA 0:01:15 | loss 2.5000 | 1,000 tokens/s | 1.50 GiB | 0:01:00 gone"
    )


@pytest.mark.parametrize("width", [20, 50, 79, 200])
def test_whole_fields_go_when_the_terminal_is_narrow(width: int) -> None:
    progress = Progress(100, is_terminal=True, now=0.0)
    progress.step(step_record(25), 60.0)
    text, full = progress.text(60.0, width), progress.text(60.0)
    assert full.startswith(text)
    assert len(text) <= width or " | " not in text
    assert "[####------------] 25/100  25%" in text
    assert full.removeprefix(text).startswith(" | ") or text == full


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (90061, "1d 1:01:01")]
)
def test_clock_time(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text
