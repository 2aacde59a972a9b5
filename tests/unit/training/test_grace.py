from __future__ import annotations

from pathlib import Path

from mindspeed_lora.training.grace import SaveGrace, estimate_save_seconds


def test_what_fits_is_not_told() -> None:
    grace = SaveGrace(30.0, 2.0)
    assert grace.after_step(60.0) is not None, "the first step counts until a shorter one is seen"
    grace = SaveGrace(30.0, 2.0)
    assert [grace.after_step(1.0) for _ in range(5)] == [None] * 5
    assert grace.after_save(3.0) is None


def test_an_estimate_and_a_measurement_are_told_once() -> None:
    grace = SaveGrace(30.0, 40.0)
    told = [grace.after_step(1.0) for _ in range(3)]
    assert told[0] is not None and told[1:] == [None, None]
    assert "a save is estimated to take 40 s and a step up to 1 s" in told[0]
    assert "--sigterm-grace-seconds 30" in told[0] and "\n" not in told[0]
    measured = grace.after_save(35.0)
    assert measured is not None and "a save took 35 s" in measured
    assert grace.after_save(36.0) is None and grace.after_step(1.0) is None


def test_a_long_first_step_is_forgotten() -> None:
    grace = SaveGrace(30.0, 2.0)
    grace.after_step(25.0)
    grace.after_step(1.0)
    assert grace.after_save(20.0) is None


def test_the_estimate_grows_with_the_size(tmp_path: Path) -> None:
    small, large = (estimate_save_seconds(tmp_path, size) for size in (0, 1 << 40))
    assert 0 < small < 1 < large
    assert estimate_save_seconds(tmp_path / "nowhere", 1 << 40) == 0.0
