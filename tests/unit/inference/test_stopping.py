from __future__ import annotations

from mindspeed_lora.inference.stopping import StopRule

RULE = StopRule(((2,), (7, 8, 9), (8, 9, 9, 9)))


def test_an_end_token_ends() -> None:
    assert RULE.ending([5, 2]) == 1
    assert RULE.ending([2, 5]) == 0


def test_a_sequence_ends_only_when_it_is_whole() -> None:
    assert [RULE.ending([1, 7, 8, 9][:n]) for n in range(1, 5)] == [0, 0, 0, 3]


def test_what_may_become_a_stop_is_held_back() -> None:
    assert [RULE.held_back([1, 7, 8][:n]) for n in range(1, 4)] == [0, 1, 2]
    assert RULE.held_back([7, 8, 1]) == 0
    assert RULE.held_back([1, 8, 9]) == 2


def test_without_stops_nothing_ends() -> None:
    rule = StopRule(())
    assert rule.ending([1, 2]) == 0 and rule.held_back([1]) == 0 and rule.held_back([]) == 0
