"""``--manual-gc``."""

from __future__ import annotations

import gc
from unittest.mock import Mock

import pytest

from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.training.garbage import garbage_collection


def test_garbage_is_collected_after_the_steps_that_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    collections = Mock()
    monkeypatch.setattr(gc, "collect", collections)
    with garbage_collection(TrainingConfig(manual_gc=True, manual_gc_interval=3)) as collect:
        assert not gc.isenabled()
        for step in range(1, 8):
            collect(step)
    assert gc.isenabled()
    assert collections.call_count == 1 + 2


def test_by_itself_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    collections = Mock()
    monkeypatch.setattr(gc, "collect", collections)
    with garbage_collection(TrainingConfig()) as collect:
        collect(1)
        assert gc.isenabled()
    with pytest.raises(ValueError), garbage_collection(TrainingConfig(manual_gc=True)) as collect:
        collect(1)
        raise ValueError
    assert gc.isenabled() and collections.call_count == 1
