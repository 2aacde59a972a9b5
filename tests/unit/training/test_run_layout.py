from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mindspeed_lora.training.run_layout import RunLayout

LAYOUT = RunLayout(
    tp=2,
    pp=2,
    cp=1,
    dp=1,
    stages="0-1, 2-3",
    sequence_parallel=True,
    distributed_optimizer=False,
    micro_batch_size=2,
)


def test_the_same_layout_changes_nothing() -> None:
    assert LAYOUT.changes(LAYOUT.state()) == []
    assert LAYOUT.keeps_random_states(LAYOUT.state())


def test_changes_are_told_in_words() -> None:
    other = dataclasses.replace(LAYOUT, tp=1, dp=2, distributed_optimizer=True, stages="0 and 2, 1 and 3")
    assert other.changes(LAYOUT.state()) == [
        "tensor parallel 2 → 1",
        "data parallel 1 → 2",
        "layers by stage 0-1, 2-3 → 0 and 2, 1 and 3",
        "distributed optimizer off → on",
    ]


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({"distributed_optimizer": True}, True),
        ({"tp": 1}, False),
        ({"cp": 2}, False),
        ({"dp": 2}, False),
        ({"stages": "0, 1-3"}, False),
        ({"sequence_parallel": False}, False),
        ({"micro_batch_size": 1}, False),
    ],
)
def test_random_states_are_those_of_ranks_that_compute_the_same(changed: dict[str, Any], kept: bool) -> None:
    assert dataclasses.replace(LAYOUT, **changed).keeps_random_states(LAYOUT.state()) is kept


def test_what_a_checkpoint_does_not_tell_is_passed_over() -> None:
    assert dataclasses.replace(LAYOUT, micro_batch_size=8).changes({"tp": 2}) == []
    assert LAYOUT.keeps_random_states({})
